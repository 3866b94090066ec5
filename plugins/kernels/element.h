// Vectors of activations: how consecutive channels get from memory into float registers and back.
#pragma once

#include <cstring>

#include "device.h"

namespace lrq {

constexpr int32_t kVectorBytes = 16;

// What is loaded and stored at once.
template <int32_t kBytes>
struct Vector;

template <>
struct Vector<16> {
    using Type = uint4;
};

template <>
struct Vector<8> {
    using Type = uint2;
};

template <>
struct Vector<4> {
    using Type = uint32_t;
};

template <>
struct Vector<2> {
    using Type = uint16_t;
};

// kCount elements of T as vectors of at most 16 bytes.
template <int32_t kCount, class T>
struct Vectors {
    static constexpr int32_t kAll = kCount * static_cast<int32_t>(sizeof(T));
    static constexpr int32_t kBytes = kAll < kVectorBytes ? kAll : kVectorBytes;
    static constexpr int32_t kElements = kBytes / static_cast<int32_t>(sizeof(T));
    static_assert(kCount % kElements == 0, "whole vectors");
    using Type = typename Vector<kBytes>::Type;
};

// values[0 .. kCount) from kCount consecutive T that begin at a multiple of their bytes, or of 16.
template <int32_t kCount, class T>
__device__ inline void loadVector(T const* address, float (&values)[kCount]) {
    using Whole = Vectors<kCount, T>;
#pragma unroll
    for (int32_t vector = 0; vector < kCount / Whole::kElements; ++vector) {
        auto const loaded = reinterpret_cast<typename Whole::Type const*>(address)[vector];
        T elements[Whole::kElements];
        memcpy(elements, &loaded, sizeof(loaded));
#pragma unroll
        for (int32_t index = 0; index < Whole::kElements; ++index) {
            values[vector * Whole::kElements + index] = toFloat(elements[index]);
        }
    }
}

template <int32_t kCount, class T>
__device__ inline void storeVector(T* address, float const (&values)[kCount]) {
    using Whole = Vectors<kCount, T>;
#pragma unroll
    for (int32_t vector = 0; vector < kCount / Whole::kElements; ++vector) {
        T elements[Whole::kElements];
#pragma unroll
        for (int32_t index = 0; index < Whole::kElements; ++index) {
            elements[index] = fromFloat<T>(values[vector * Whole::kElements + index]);
        }
        typename Whole::Type packed;
        memcpy(&packed, elements, sizeof(packed));
        reinterpret_cast<typename Whole::Type*>(address)[vector] = packed;
    }
}

template <int32_t kCount>
__device__ inline void clear(float (&values)[kCount]) {
#pragma unroll
    for (int32_t index = 0; index < kCount; ++index) {
        values[index] = 0.0f;
    }
}

}  // namespace lrq
