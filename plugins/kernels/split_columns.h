// A column whose values are too many for a thread: a few threads split it. Each holds a share of the
// inputs, all see the whole column in shared memory, and each makes a share of the outputs.
//
// Every output has signs of its own, and still all threads run one code: within a border of one row
// and column H_K is a circulant of order K - 1, or within a border of two a circulant of 2 x 2 blocks.
// What outputs s, s + 1, ... of that cycle need of its inputs s, s + 1, ... is what outputs 0, 1, ...
// need of inputs 0, 1, ..., if s is a multiple of 4.
#pragma once

#include "exchange.h"
#include "hadamard_columns.h"

namespace lrq {

// kShares threads for each place of a block's kBase parts.
template <int32_t kBase_, int32_t kShares, int32_t kMaxThreads_>
struct SplitColumns {
    static constexpr int32_t kBase = kBase_;
    static constexpr int32_t kParts = kBase;
    static constexpr int32_t kVectors = kBase / kShares;
    static constexpr int32_t kWidth = 1;
    static constexpr int32_t kMaxThreads = kMaxThreads_;
    static constexpr int32_t kTokens = 1;
    static constexpr int32_t kBorder = kHadamardBorder<kBase>;
    // Of the cycle; the last share's may go on behind its end, as far as others have them already.
    static constexpr int32_t kOutputs = (kVectors + 3) / 4 * 4;
    static constexpr int32_t kOfLast = kBase - kBorder - kOutputs * (kShares - 1);
    static constexpr int32_t kMixed = kBorder + kOutputs;
    // Odd, so that neighbouring columns begin in different banks. Two shares in a warp, of parts of 16,
    // may meet.
    static constexpr int32_t kColumnPitch = kBase + 1;

    static_assert(kVectors * kShares == kBase && 0 < kOfLast && kOfLast <= kOutputs,
                  "shares cover the column");
    static_assert(kMaxThreads / kShares < 2 * kWidestShuffled,
                  "a part is not shuffled across warps");

    static constexpr bool takesPart(int32_t) {
        return true;
    }

    // Of the columns, then of what was made of them.
    static constexpr int64_t sharedBytes(int32_t partLog, int32_t channels) {
        int64_t const columns = 4 * static_cast<int64_t>(channels / kBase) * kColumnPitch;
        int64_t const exchanged = ExchangePlan(kParts, partLog, true).bytes(channels);
        return columns > exchanged ? columns : exchanged;
    }

    ExchangePlan plan;
    int32_t place;  // in a part
    int32_t share;  // of the column
    int32_t block;  // of the token
    bool isLive;    // the token has it

    // Lanes of a warp are neighbouring places of one share, as far as a part is wide.
    __device__ SplitColumns(int32_t thread, int32_t partLog, int32_t channels)
        : plan(kParts, partLog, true) {
        int32_t const part = thread >> partLog;
        place = thread - (part << partLog);
        block = part / kShares;
        share = part - block * kShares;
        isLive = ((block * kParts) << partLog) < channels;
    }

    template <class T>
    __device__ T* at(T* row, int32_t vector) const {
        uint32_t const stride = uint32_t{1} << plan.partLog;
        int32_t const first = ((block * kParts + share * kVectors) << plan.partLog) + place;
        return row + first + static_cast<uint64_t>(stride) * static_cast<uint32_t>(vector);
    }

    template <class Function>
    __device__ void forEachLive(Function function) const {
        if (isLive) {
#pragma unroll
            for (int32_t vector = 0; vector < kVectors; ++vector) {
                function(vector);
            }
        }
    }

    // The border, then the cycle.
    __device__ float* column(float* shared) const {
        return shared + ((block << plan.partLog) + place) * kColumnPitch;
    }

    __device__ void mix(float const (&values)[kVectors][1], float (&mixed)[kMixed][1],
                        float* shared) const {
        float* const own = column(shared) + share * kVectors;
        forEachLive([&](int32_t vector) { own[vector] = values[vector][0]; });
        synchronizeBlock();
        if (isLive) {
            float outputs[kMixed];
            multiplyCycle<kBase>(column(shared), kOutputs * share, outputs);
#pragma unroll
            for (int32_t output = 0; output < kMixed; ++output) {
                mixed[output][0] = outputs[output];
            }
        }
        synchronizeBlock();
    }

    __device__ void handOver(float const (&mixed)[kMixed][1], float* shared) const {
        if (!isLive) {
            return;
        }
        float* const border = shared + plan.offsetOf(block, 0, place);
        float* const behind = border + kOutputs * share * plan.partPitch;
        if (share == 0) {
            store<0, kBorder>(border, mixed);
        }
        store<kBorder, kBorder + kOfLast>(behind, mixed);
        if (share + 1 < kShares) {
            store<kBorder + kOfLast, kMixed>(behind, mixed);
        }
    }

    template <int32_t kFrom, int32_t kTo>
    __device__ void store(float* first, float const (&mixed)[kMixed][1]) const {
#pragma unroll
        for (int32_t output = kFrom; output < kTo; ++output) {
            first[output * plan.partPitch] = mixed[output][0];
        }
    }
};

}  // namespace lrq
