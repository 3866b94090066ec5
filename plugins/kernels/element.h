// Vectors of activations: how consecutive channels get from memory into float registers and back.
#pragma once

#include <cstring>
#include <type_traits>

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

// kCount elements of T as vectors of at most 16 bytes; two at a time are converted where two fit a
// word.
template <int32_t kCount, class T>
struct Vectors {
    static constexpr int32_t kAll = kCount * static_cast<int32_t>(sizeof(T));
    static constexpr int32_t kBytes = kAll < kVectorBytes ? kAll : kVectorBytes;
    static constexpr int32_t kElements = kBytes / static_cast<int32_t>(sizeof(T));
    static constexpr bool kPairs = sizeof(T) == 2 && kElements > 1;
    static_assert(kCount % kElements == 0, "whole vectors");
    using Type = typename Vector<kBytes>::Type;
    using Unit = std::conditional_t<kPairs, uint32_t, T>;
    static constexpr int32_t kUnits = kBytes / static_cast<int32_t>(sizeof(Unit));
};

// values[0 .. kCount) from kCount consecutive T that begin at a multiple of their bytes, or of 16.
template <int32_t kCount, class T>
__device__ inline void loadVector(T const* address, float (&values)[kCount]) {
    using Whole = Vectors<kCount, T>;
#pragma unroll
    for (int32_t vector = 0; vector < kCount / Whole::kElements; ++vector) {
        auto const loaded = reinterpret_cast<typename Whole::Type const*>(address)[vector];
        typename Whole::Unit units[Whole::kUnits];
        memcpy(units, &loaded, sizeof(loaded));
#pragma unroll
        for (int32_t unit = 0; unit < Whole::kUnits; ++unit) {
            if constexpr (Whole::kPairs) {
                int32_t const index = vector * Whole::kElements + 2 * unit;
                unpackTwo<T>(units[unit], values[index], values[index + 1]);
            } else {
                values[vector * Whole::kElements + unit] = toFloat(units[unit]);
            }
        }
    }
}

template <int32_t kCount, class T>
__device__ inline void storeVector(T* address, float const (&values)[kCount]) {
    using Whole = Vectors<kCount, T>;
#pragma unroll
    for (int32_t vector = 0; vector < kCount / Whole::kElements; ++vector) {
        typename Whole::Unit units[Whole::kUnits];
#pragma unroll
        for (int32_t unit = 0; unit < Whole::kUnits; ++unit) {
            if constexpr (Whole::kPairs) {
                int32_t const index = vector * Whole::kElements + 2 * unit;
                units[unit] = packTwo<T>(values[index], values[index + 1]);
            } else {
                units[unit] = fromFloat<T>(values[vector * Whole::kElements + unit]);
            }
        }
        typename Whole::Type packed;
        memcpy(&packed, units, sizeof(packed));
        reinterpret_cast<typename Whole::Type*>(address)[vector] = packed;
    }
}

// What is left of two floats that were stored as T.
template <class T>
__device__ inline void roundTwo(float& first, float& second) {
    if constexpr (sizeof(T) == 2) {
        unpackTwo<T>(packTwo<T>(first, second), first, second);
    }
}

}  // namespace lrq
