#include "checks.h"
#include "decode_weight.h"
#include "failure.h"
#include "kernels.h"
#include "linear.h"
#include "runtime.h"

namespace {

using namespace lrq;

constexpr int32_t kArchitectures[] = {LRQ_ARCHITECTURES};  // as CMake compiles them: 80, 86, ...

cudaStream_t streamOf(void* stream) {
    return static_cast<cudaStream_t>(stream);
}

// The current device, if this library has kernels for it.
int32_t findDevice(Device* device) {
    if (!queryDevice(device)) {
        return fail(LRQ_CUDA_ERROR, "there is no CUDA device (%s)", lastCudaError());
    }
    for (int32_t const architecture : kArchitectures) {
        if (architecture == device->architecture) {
            return 0;
        }
    }
    return fail(LRQ_NOT_COMPILED,
                "no kernels for compute capability %d.%d: add it to LRQ_CUDA_ARCHITECTURES and "
                "build again",
                device->architecture / 10, device->architecture % 10);
}

}  // namespace

int32_t lrqRotate(LrqRotation const* rotation, void* stream) {
    if (int32_t const fault = checkRotation(rotation)) {
        return fault;
    }
    if (countOf(rotation->tokens) == 0) {
        return 0;
    }
    Device device{};
    if (int32_t const fault = findDevice(&device)) {
        return fault;
    }
    return runRotation(*rotation, device, streamOf(stream));
}

int32_t lrqDecode(LrqWeight const* weight, int8_t* decoded, void* stream) {
    if (int32_t const fault = checkDecode(weight, decoded, "decoded")) {
        return fault;
    }
    Device device{};
    if (int32_t const fault = findDevice(&device)) {
        return fault;
    }
    return runDecode(*weight, decoded, streamOf(stream));
}

int32_t lrqDequantize(
    LrqWeight const* weight, float const* scale, float* dequantized, void* stream) {
    if (int32_t const fault = checkDecode(weight, dequantized, "dequantized")) {
        return fault;
    }
    if (int32_t const fault = checkRowScales(scale)) {
        return fault;
    }
    Device device{};
    if (int32_t const fault = findDevice(&device)) {
        return fault;
    }
    if (!decodeToFloat(decodeArgumentsOf(*weight, scale, dequantized), streamOf(stream))) {
        return fail(LRQ_CUDA_ERROR, "lrqDequantize: CUDA refused the launch (%s)", lastCudaError());
    }
    return 0;
}

int64_t lrqLinearWorkspace(LrqLinear const* linear) {
    return checkLinearSizes(linear) != 0 ? -1 : planOf(*linear).bytes;
}

int32_t lrqLinear(LrqLinear const* linear, void* workspace, int64_t workspaceBytes, void* stream) {
    if (int32_t const fault = checkLinear(linear)) {
        return fault;
    }
    if (countOf(linear->tokens) == 0) {
        return 0;
    }
    int64_t const needed = planOf(*linear).bytes;
    if (workspaceBytes < needed || (workspace == nullptr && needed > 0)) {
        return fail(LRQ_BAD_WORKSPACE, "workspace has %lld bytes%s, needed %lld",
                    static_cast<long long>(workspaceBytes), workspace == nullptr ? " at null" : "",
                    static_cast<long long>(needed));
    }
    if (reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment != 0) {
        return fail(LRQ_MISALIGNED, "workspace is %p, needed a multiple of %lld bytes", workspace,
                    static_cast<long long>(kWorkspaceAlignment));
    }
    Device device{};
    if (int32_t const fault = findDevice(&device)) {
        return fault;
    }
    return runLinear(*linear, device, static_cast<uint8_t*>(workspace), streamOf(stream));
}

char const* lrqKernelsError(void) {
    return failureText();
}

int32_t lrqKernelsStructSizes(int32_t* sizes, int32_t capacity) {
    constexpr int32_t kSizes[] = {sizeof(LrqTokens), sizeof(LrqModulation), sizeof(LrqRotation),
                                  sizeof(LrqWeight), sizeof(LrqLinear)};
    int32_t count = 0;
    for (int32_t const size : kSizes) {
        if (count < capacity) {
            sizes[count] = size;
        }
        ++count;
    }
    return count;
}

int32_t lrqKernelsArchitectures(int32_t* architectures, int32_t capacity) {
    int32_t count = 0;
    for (int32_t const architecture : kArchitectures) {
        if (count < capacity) {
            architectures[count] = architecture;
        }
        ++count;
    }
    return count;
}
