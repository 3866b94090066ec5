// What the host side asks of CUDA beside launches. tests/plugins/emulator has its twin.
#pragma once

#if defined(LRQ_EMULATED)
#include "emulator.h"
#else

#include <cuda_runtime_api.h>

#include "product.h"

namespace lrq {

// The device that launches go to; false if there is none.
inline bool queryDevice(Device* device) {
    int index = 0;
    int major = 0;
    int minor = 0;
    int processors = 0;
    int sharedBytes = 0;
    if (cudaGetDevice(&index) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index) !=
            cudaSuccess ||
        cudaDeviceGetAttribute(&sharedBytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) !=
            cudaSuccess) {
        return false;
    }
    *device = {10 * major + minor, processors, sharedBytes};
    return true;
}

inline bool copyBytes(void* target, void const* source, int64_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                           stream) == cudaSuccess;
}

// The text of the last error, which is forgotten.
inline char const* lastCudaError() {
    return cudaGetErrorString(cudaGetLastError());
}

}  // namespace lrq

#endif
