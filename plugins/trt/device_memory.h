// Device memory that outlives a call of enqueue.
#pragma once

#include <cstdint>
#include <memory>

namespace lrq::trt {

struct FreeDeviceMemory {
    void operator()(int8_t* memory) const noexcept;
};
using DeviceMemory = std::unique_ptr<int8_t, FreeDeviceMemory>;

// Null if there is not enough.
DeviceMemory allocateDeviceMemory(int64_t bytes) noexcept;

// Whether `stream`, a cudaStream_t, records a CUDA graph instead of computing: allocating would end
// that.
bool isCaptured(void* stream) noexcept;

}  // namespace lrq::trt
