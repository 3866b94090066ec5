// Sums and maxima over all threads of a block.
#pragma once

#include "device.h"

namespace lrq {

constexpr int32_t kWarp = 32;      // lanes
constexpr int32_t kMaxWarps = 32;  // of a block

struct Add {
    __device__ static float join(float left, float right) {
        return left + right;
    }
};

struct Max {
    __device__ static float join(float left, float right) {
        return fmaxf(left, right);
    }
};

// The sum or maximum over all threads of a block, the same bits in each of them. `partials` has a
// float for each warp and is not used again without a barrier in between.
template <class Operation>
__device__ inline float reduceBlock(float value, float* partials) {
#pragma unroll
    for (int32_t mask = kWarp / 2; mask > 0; mask /= 2) {
        value = Operation::join(value, shuffleXor(value, mask));
    }
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    if (thread % kWarp == 0) {
        partials[thread / kWarp] = value;
    }
    synchronizeBlock();
    float result = partials[0];
    int32_t const warps = static_cast<int32_t>(blockDim.x) / kWarp;
    for (int32_t warp = 1; warp < warps; ++warp) {
        result = Operation::join(result, partials[warp]);
    }
    return result;
}

}  // namespace lrq
