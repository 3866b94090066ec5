// device_memory.h on the host, beside kernels_on_cpu.cpp.
#include "device_memory.h"

#include <cstdlib>

namespace lrq::trt {

void FreeDeviceMemory::operator()(int8_t* memory) const noexcept {
    std::free(memory);
}

DeviceMemory allocateDeviceMemory(int64_t bytes) noexcept {
    return DeviceMemory(static_cast<int8_t*>(std::malloc(static_cast<size_t>(bytes))));
}

bool isCaptured(void*) noexcept {
    return false;
}

}  // namespace lrq::trt
