#include "device_memory.h"

#include <cuda_runtime_api.h>

namespace lrq::trt {

bool isCaptured(void* stream) noexcept {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess ||
           status != cudaStreamCaptureStatusNone;
}

void FreeDeviceMemory::operator()(int8_t* memory) const noexcept {
    // Fails only where the context is gone, and the memory with it.
    static_cast<void>(cudaFree(memory));
}

DeviceMemory allocateDeviceMemory(int64_t bytes) noexcept {
    // Another thread may be capturing another stream, which cudaMalloc would end in stricter modes.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    void* memory = nullptr;
    cudaError_t const status = cudaMalloc(&memory, static_cast<size_t>(bytes));
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != cudaSuccess) {
        static_cast<void>(cudaGetLastError());  // said by the null; later calls shall not report it
        return nullptr;
    }
    return DeviceMemory(static_cast<int8_t*>(memory));
}

}  // namespace lrq::trt
