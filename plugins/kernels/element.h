// Vectors of activations: how a run of channels gets from memory into float registers and back.
#pragma once

#include <cstring>

#include "device.h"

namespace lrq {

constexpr int32_t kVectorBytes = 16;

// values[0 .. kCount) from kCount consecutive T that begin at a multiple of 16 bytes.
template <int32_t kCount, class T>
__device__ inline void loadRun(T const* address, float (&values)[kCount]) {
    constexpr int32_t kPerVector = kVectorBytes / sizeof(T);
    static_assert(kCount % kPerVector == 0, "whole vectors");
#pragma unroll
    for (int32_t vector = 0; vector < kCount / kPerVector; ++vector) {
        uint4 const loaded = reinterpret_cast<uint4 const*>(address)[vector];
        T elements[kPerVector];
        memcpy(elements, &loaded, sizeof(loaded));
#pragma unroll
        for (int32_t index = 0; index < kPerVector; ++index) {
            values[vector * kPerVector + index] = toFloat(elements[index]);
        }
    }
}

template <int32_t kCount, class T>
__device__ inline void storeRun(T* address, float const (&values)[kCount]) {
    constexpr int32_t kPerVector = kVectorBytes / sizeof(T);
    static_assert(kCount % kPerVector == 0, "whole vectors");
#pragma unroll
    for (int32_t vector = 0; vector < kCount / kPerVector; ++vector) {
        T elements[kPerVector];
#pragma unroll
        for (int32_t index = 0; index < kPerVector; ++index) {
            elements[index] = fromFloat<T>(values[vector * kPerVector + index]);
        }
        uint4 packed;
        memcpy(&packed, elements, sizeof(packed));
        reinterpret_cast<uint4*>(address)[vector] = packed;
    }
}

// The float that is left of `value` once it was stored as T.
template <class T>
__device__ inline float roundedTo(float value) {
    return toFloat(fromFloat<T>(value));
}

}  // namespace lrq
