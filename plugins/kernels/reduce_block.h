// Sums and maxima over all threads of a block, the same bits in each of them. `partials` has a float
// for each warp and is not used again without a barrier in between.
#pragma once

#include "device.h"

namespace lrq {

constexpr int32_t kWarp = 32;      // lanes
constexpr int32_t kMaxWarps = 32;  // of a block

// Every warp's own, once all of them have written theirs.
__device__ inline void shareWithWarps(float own, float* partials) {
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    if (thread % kWarp == 0) {
        partials[thread / kWarp] = own;
    }
    synchronizeBlock();
}

__device__ inline int32_t warpsOfBlock() {
    return static_cast<int32_t>(blockDim.x) / kWarp;
}

__device__ inline float sumOfBlock(float value, float* partials) {
#pragma unroll
    for (int32_t mask = kWarp / 2; mask > 0; mask /= 2) {
        value += shuffleXor(value, mask);
    }
    shareWithWarps(value, partials);
    float sum = partials[0];
    for (int32_t warp = 1; warp < warpsOfBlock(); ++warp) {
        sum += partials[warp];
    }
    return sum;
}

// Of values that are not negative, whose bits are in the order of the floats.
__device__ inline float peakOfBlock(float value, float* partials) {
    shareWithWarps(floatOf(maximumOfWarp(bitsOf(value))), partials);
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    return floatOf(maximumOfWarp(lane < warpsOfBlock() ? bitsOf(partials[lane]) : 0));
}

}  // namespace lrq
