// Residency `int8`: a weight that is decoded once and stays in device memory, shared by every
// execution context of an engine. TensorRT makes one plugin a layer when it deserializes an engine
// and clones it for each context; all clones hold the same ResidentWeight.
//
// TensorRT's own way of sharing, IPluginRegistry::acquirePluginResource, is not for this library:
// the registry's functions lie in other places in TensorRT 10 than in 11, and one binary serves
// both.
#pragma once

#include <mutex>

#include "device_memory.h"

namespace lrq::trt {

class ResidentWeight {
public:
    // Room for so many bytes, the same on every call; null where there is none. Freed with the last
    // clone.
    int8_t* room(int64_t bytes) {
        std::lock_guard<std::mutex> const lock(mMutex);
        if (mMemory == nullptr) {
            mMemory = allocateDeviceMemory(bytes);
        }
        return mMemory.get();
    }

private:
    std::mutex mMutex;
    DeviceMemory mMemory;
};

}  // namespace lrq::trt
