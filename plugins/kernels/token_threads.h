// Which threads of a block work on which token, and what they find out together: sums and maxima, the
// same bits in each of them. `partials` has room for the block and is not used again without a
// barrier in between.
#pragma once

#include "reduce_block.h"

namespace lrq {

constexpr int32_t kMaxGroups = 12;  // of 4 lanes, of each of several tokens

// kTokens of a block, each with as many of its threads: all of them for one token, which end within a
// warp wherever they do; whole groups of 4 lanes for several, so that no lane of a block is idle.
template <int32_t kTokens>
struct TokenThreads {
    static_assert((kTokens & (kTokens - 1)) == 0, "found by halving");
    static constexpr int32_t kGroup = kTokens == 1 ? kWarp : 4;  // lanes that have one partial
    using Partials = float[kTokens == 1 ? kMaxWarps : kTokens * kMaxGroups];

    int32_t count;   // threads of a token
    int32_t thread;  // of this token
    int32_t index;   // of the token in the block
    int64_t token;

    __device__ TokenThreads()
        : count(static_cast<int32_t>(blockDim.x) / kTokens),
          thread(static_cast<int32_t>(threadIdx.x)),
          index(0) {
#pragma unroll
        for (int32_t half = kTokens / 2; half > 0; half /= 2) {  // what a division would do
            if (thread >= half * count) {
                thread -= half * count;
                index += half;
            }
        }
        token = static_cast<int64_t>(blockIdx.x) * kTokens + index;
    }

    __device__ float sum(float value, Partials& partials) const {
        if constexpr (kTokens == 1) {
            return sumOfBlock(value, partials);
        } else {
            value += shuffleXor(value, 1);
            value += shuffleXor(value, 2);
            return join(value, partials, [](float left, float right) { return left + right; });
        }
    }

    // Of values that are not negative.
    __device__ float peak(float value, Partials& partials) const {
        if constexpr (kTokens == 1) {
            return peakOfBlock(value, partials);
        } else {
            value = fmaxf(value, shuffleXor(value, 1));
            value = fmaxf(value, shuffleXor(value, 2));
            return join(value, partials, [](float left, float right) { return fmaxf(left, right); });
        }
    }

    template <class Function>
    __device__ float join(float own, Partials& partials, Function function) const {
        int32_t const groups = count / kGroup;
        float* const ofToken = partials + index * groups;
        if (thread % kGroup == 0) {
            ofToken[thread / kGroup] = own;
        }
        synchronizeBlock();
        float joined = ofToken[0];
#pragma unroll
        for (int32_t group = 1; group < kMaxGroups; ++group) {
            if (group < groups) {
                joined = function(joined, ofToken[group]);
            }
        }
        return joined;
    }
};

}  // namespace lrq
