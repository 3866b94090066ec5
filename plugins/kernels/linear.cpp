#include "linear.h"

#include <cinttypes>
#include <cmath>

#include "../core/hadamard.h"
#include "../core/words.h"
#include "any_size.h"
#include "checks.h"
#include "decode_weight.h"
#include "failure.h"
#include "few_tokens.h"
#include "instantiations.h"
#include "rotate_quantize.h"
#include "runtime.h"

namespace lrq {
namespace {

TokenRows rowsOf(LrqModulation const& modulation, LrqTokens const& tokens) {
    return {modulation.data, modulation.outerStride, modulation.innerStride,
            static_cast<int32_t>(tokens.innerCount)};
}

int32_t failedLaunch(char const* what) {
    return fail(LRQ_CUDA_ERROR, "%s: CUDA refused the launch (%s)", what, lastCudaError());
}

bool launchRotation(RotateArguments const& arguments, int32_t type, cudaStream_t stream) {
    switch (type) {
        case LRQ_FLOAT:
            return rotateFloat(arguments, stream);
        case LRQ_HALF:
            return rotateHalf(arguments, stream);
        default:
            return rotateBfloat16(arguments, stream);
    }
}

// The largest rotations lie in shared memory, of which devices have 99 to 227 KiB a block.
int32_t checkSharedMemory(int32_t block, Device const& device) {
    constexpr int64_t kOfTheKernel = 1024;
    HadamardFactors factors{};
    factorizeHadamard(block, &factors);
    int64_t const needed = rotateSharedBytes(block, factors.base.size) + kOfTheKernel;
    if (needed <= device.sharedBytes) {
        return 0;
    }
    return fail(LRQ_NOT_COMPILED,
                "block %" PRId32 " needs %" PRId64
                " bytes of shared memory, this device has %" PRId64 ": use a smaller block",
                block, needed, device.sharedBytes);
}

// Codes of all tokens of x, rotated if the layer says so.
int32_t quantizeTokens(LrqLinear const& linear, Device const& device, int8_t* quantized,
                       float* scales, cudaStream_t stream) {
    LrqRotation rotation{};
    rotation.x = linear.x;
    rotation.signs = linear.signs;
    rotation.y = quantized;
    rotation.tokenScales = scales;
    rotation.tokens = linear.tokens;
    rotation.channels = linear.weight.cols;
    rotation.block = linear.block > 1 ? linear.block : 1;
    rotation.prologue = LRQ_NO_PROLOGUE;
    rotation.type = linear.type;
    rotation.actBits = linear.actBits;
    return runRotation(rotation, device, stream);
}

// Rows [first, first + count) of a product; its weight begins with them.
Product partOf(Product const& whole, int32_t type, int64_t first, int64_t count) {
    int64_t const elementBytes = type == LRQ_FLOAT ? 4 : 2;
    auto const advance = [](void const* data, int64_t bytes) -> void const* {
        return data == nullptr ? nullptr : static_cast<uint8_t const*>(data) + bytes;
    };
    Product part = whole;
    part.rowScales = whole.rowScales + first;
    part.bias = whole.bias == nullptr ? nullptr : whole.bias + first;
    part.gate.data = advance(whole.gate.data, first * elementBytes);
    part.residual = advance(whole.residual, first * elementBytes);
    part.y = static_cast<uint8_t*>(whole.y) + first * elementBytes;
    part.rows = static_cast<int32_t>(count);
    return part;
}

struct Choice {
    int32_t status;
    int32_t tactic;
    ProductLauncher launcher;  // of a tile
};

bool tilesFit(LrqLinear const& linear) {
    int64_t const perVector = linear.type == LRQ_FLOAT ? 4 : 8;
    return linear.weight.cols % 16 == 0 && linear.weight.rows % perVector == 0;
}

bool fewTokensServe(LrqLinear const& linear) {
    return linear.weight.codes != nullptr && linear.weight.format != LRQ_INT8 &&
           linear.weight.levels != nullptr &&
           fewTokensFit(decodeArgumentsOf(linear.weight, nullptr, nullptr), countOf(linear.tokens));
}

Choice chooseTactic(LrqLinear const& linear, Device const& device, int64_t rows) {
    Family const family = familyOf(device);
    bool const isGated = linear.residual != nullptr;
    uint32_t const available =
        tilesFit(linear) ? availableTactics(family, linear.type, isGated) : 0;
    int32_t tactic = linear.tactic;
    if (tactic == LRQ_AUTO && fewTokensServe(linear)) {
        tactic = LRQ_FEW_TOKENS;
    }
    if (tactic == LRQ_AUTO) {
        tactic = chooseTile(available, countOf(linear.tokens), rows, device.processors,
                            clusterOf(family));
    }
    if (tactic == LRQ_AUTO && (!tilesFit(linear) || !hasInstantiations())) {
        tactic = LRQ_ANY_SIZE;
    }
    if (tactic == LRQ_ANY_SIZE || (tactic == LRQ_FEW_TOKENS && fewTokensServe(linear))) {
        return {0, tactic, nullptr};
    }
    ProductLauncher const launcher =
        tilesFit(linear) ? findLauncher(family, tactic, linear.type, isGated) : nullptr;
    if (launcher != nullptr) {
        return {0, tactic, launcher};
    }
    int32_t const status =
        fail(LRQ_NOT_COMPILED,
             "tactic %" PRId32 " has no kernel for %" PRId64 " tokens, %" PRId64 " rows, %" PRId64
             " columns, type %" PRId32 "%s on compute capability %" PRId32
             ": use LRQ_AUTO, or build without LRQ_ONE_OF_EACH",
             tactic, countOf(linear.tokens), linear.weight.rows, linear.weight.cols, linear.type,
             isGated ? " with gate and residual" : "", device.architecture);
    return {status, tactic, nullptr};
}

bool launchProduct(Choice const& choice, Product const& product, LrqLinear const& linear,
                   Device const& device, cudaStream_t stream) {
    return choice.launcher != nullptr ? choice.launcher(product, device, stream)
                                      : multiplyAnySize(product, linear.type, stream);
}

// Decodes as many rows as stay in L2, multiplies them, and goes on.
int32_t multiplyInParts(Choice const& choice, Product product, LrqLinear const& linear,
                        Device const& device, int8_t* decoded, cudaStream_t stream) {
    DecodeArguments const weight = decodeArgumentsOf(linear.weight, nullptr, decoded);
    int64_t const most = rowsDecodedAtOnce(weight.rows, weight.cols);
    product.weight = decoded;
    for (int64_t first = 0; first < weight.rows; first += most) {
        int64_t const count = weight.rows - first < most ? weight.rows - first : most;
        if (!decodeToInt8(rowsOf(weight, first, count), stream)) {
            return failedLaunch("lrqLinear: decode");
        }
        Product const part = partOf(product, linear.type, first, count);
        if (!launchProduct(choice, part, linear, device, stream)) {
            return failedLaunch("lrqLinear: product");
        }
    }
    return 0;
}

int32_t multiply(LrqLinear const& linear, Product product, Device const& device,
                 uint8_t* workspace, cudaStream_t stream) {
    bool const isResident = linear.decoded != nullptr || linear.weight.format == LRQ_INT8;
    int64_t const rows = isResident ? linear.weight.rows
                                    : rowsDecodedAtOnce(linear.weight.rows, linear.weight.cols);
    Choice const choice = chooseTactic(linear, device, rows);
    if (choice.status != 0) {
        return choice.status;
    }
    if (choice.tactic == LRQ_FEW_TOKENS) {
        DecodeArguments const weight = decodeArgumentsOf(linear.weight, nullptr, nullptr);
        return multiplyFewTokens(product, weight, linear.type, stream)
                   ? 0
                   : failedLaunch("lrqLinear: few tokens");
    }
    if (!isResident) {
        int8_t* const decoded = reinterpret_cast<int8_t*>(workspace + planOf(linear).decoded);
        return multiplyInParts(choice, product, linear, device, decoded, stream);
    }
    product.weight = linear.decoded != nullptr ? linear.decoded
                                               : static_cast<int8_t const*>(linear.weight.codes);
    return launchProduct(choice, product, linear, device, stream)
               ? 0
               : failedLaunch("lrqLinear: product");
}

}  // namespace

WorkspacePlan planOf(LrqLinear const& linear) {
    bool const decodes = linear.decoded == nullptr && linear.weight.format != LRQ_INT8;
    return planWorkspace(countOf(linear.tokens), linear.weight.rows, linear.weight.cols,
                         linear.x != nullptr, decodes);
}

DecodeArguments decodeArgumentsOf(LrqWeight const& weight, float const* scales, void* decoded) {
    DecodeArguments arguments{};
    arguments.codes = static_cast<uint8_t const*>(weight.codes);
    arguments.levels = weight.levels;
    arguments.rowScales = scales;
    arguments.decoded = decoded;
    arguments.rows = weight.rows;
    arguments.cols = weight.cols;
    arguments.groupSize = weight.format == LRQ_INT8 ? weight.cols : weight.groupSize;
    arguments.format = static_cast<Format>(weight.format);
    arguments.layout = static_cast<CodesLayout>(weight.layout);
    arguments.bits = weight.bits;
    if (weight.format == LRQ_TWIN_LOG) {
        arguments.mantissas = makeMantissas(weight.fractionBits, weight.integerBits);
    }
    return arguments;
}

DecodeArguments rowsOf(DecodeArguments const& weight, int64_t first, int64_t count) {
    int64_t const groups = weight.cols / weight.groupSize;
    int64_t const levelsOfGroup = weight.format == Format::kCodebook
                                      ? int64_t{1} << weight.bits
                                      : static_cast<int64_t>(sizeof(GroupExponents));
    DecodeArguments part = weight;
    part.codes = weight.codes + codesBytes(weight.layout, weight.bits, first, weight.cols);
    part.levels = weight.levels + first * groups * levelsOfGroup;
    part.rows = count;
    return part;
}

int32_t runRotation(LrqRotation const& rotation, Device const& device, cudaStream_t stream) {
    if (int32_t const fault = checkSharedMemory(rotation.block, device)) {
        return fault;
    }
    RotateArguments arguments{};
    arguments.x = rotation.x;
    arguments.scale = rowsOf(rotation.scale, rotation.tokens);
    arguments.shift = rowsOf(rotation.shift, rotation.tokens);
    arguments.signs = rotation.signs;
    arguments.y = rotation.y;
    arguments.tokenScales = rotation.tokenScales;
    arguments.tokens = countOf(rotation.tokens);
    arguments.channels = static_cast<int32_t>(rotation.channels);
    arguments.block = rotation.block;
    arguments.prologue = rotation.prologue;
    arguments.limit = rotation.actBits == 0 ? 0 : activationLimit(rotation.actBits);
    arguments.epsilon = rotation.epsilon;
    arguments.root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(rotation.block)));
    return launchRotation(arguments, rotation.type, stream) ? 0 : failedLaunch("lrqRotate");
}

int32_t runDecode(LrqWeight const& weight, int8_t* decoded, cudaStream_t stream) {
    if (weight.format == LRQ_INT8) {
        return copyBytes(decoded, weight.codes, weight.rows * weight.cols, stream)
                   ? 0
                   : failedLaunch("lrqDecode");
    }
    return decodeToInt8(decodeArgumentsOf(weight, nullptr, decoded), stream)
               ? 0
               : failedLaunch("lrqDecode");
}

int32_t runLinear(LrqLinear const& linear, Device const& device, uint8_t* workspace,
                  cudaStream_t stream) {
    WorkspacePlan const plan = planOf(linear);
    Product product{};
    product.quantized = linear.quantized;
    product.tokenScales = linear.tokenScales;
    if (linear.x != nullptr) {
        int8_t* const quantized = reinterpret_cast<int8_t*>(workspace + plan.quantized);
        float* const scales = reinterpret_cast<float*>(workspace + plan.tokenScales);
        if (int32_t const fault = quantizeTokens(linear, device, quantized, scales, stream)) {
            return fault;
        }
        product.quantized = quantized;
        product.tokenScales = scales;
    }
    product.rowScales = linear.rowScales;
    product.bias = linear.bias;
    product.gate = rowsOf(linear.gate, linear.tokens);
    product.residual = linear.residual;
    product.y = linear.y;
    product.tokens = static_cast<int32_t>(countOf(linear.tokens));
    product.rows = static_cast<int32_t>(linear.weight.rows);
    product.cols = static_cast<int32_t>(linear.weight.cols);
    product.stride = linear.weight.rows;
    return multiply(linear, product, device, workspace, stream);
}

}  // namespace lrq
