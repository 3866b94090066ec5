// A column: one or a few neighbouring places in all parts of a block, held by one thread, which
// mixes them with H_K (x) H_J without talking to anyone.
#pragma once

#include "exchange.h"
#include "hadamard_columns.h"

namespace lrq {

// kWidth places in each of kBase kJoin parts. A kPartLog of 0 is one that only the launch knows.
template <int32_t kBase_, int32_t kJoin_, int32_t kWidth_, int32_t kPartLog, int32_t kMaxThreads_,
          int32_t kTokens_ = 1>
struct Columns {
    static constexpr int32_t kBase = kBase_;
    static constexpr int32_t kJoin = kJoin_;
    static constexpr int32_t kParts = kBase * kJoin;  // of a block
    static constexpr int32_t kVectors = kParts;       // of a thread, before mixing
    static constexpr int32_t kMixed = kParts;         // and after it
    static constexpr int32_t kWidth = kWidth_;
    static constexpr int32_t kMaxThreads = kMaxThreads_;  // of a block
    static constexpr int32_t kTokens = kTokens_;          // of a block
    // Two blocks of eight tokens of 1152 channels fit the 100 KiB of the smaller processors without.
    static constexpr bool kApart = kTokens == 1;

    // Every place of a part has a thread of its own where its size is not fixed, so one that many
    // threads hold is at most as wide as lanes of one warp can shuffle.
    static_assert(kPartLog > 0 || (kWidth == 1 && kMaxThreads < 2 * kWidestShuffled),
                  "a part is not shuffled across warps");

    static_assert(kTokens == 1 || kMaxThreads <= 4 * kMaxGroups * kTokens,
                  "every 4 lanes have a partial");

    // Powers of two with smaller parts are better off as runs.
    static constexpr bool takesPart(int32_t log) {
        return kPartLog > 0 ? log == kPartLog : kBase > 1 || log >= 4;
    }

    static constexpr int64_t sharedBytes(int32_t partLog, int32_t channels) {
        return ExchangePlan(kParts, partLog, kApart).bytes(channels);
    }

    ExchangePlan plan;
    int32_t place;  // in a part
    int32_t block;  // of the token
    bool isLive;    // the token has it

    __device__ Columns(int32_t thread, int32_t partLog, int32_t channels)
        : plan(kParts, kPartLog > 0 ? kPartLog : partLog, kApart) {
        int32_t const column = kWidth * thread;
        block = column >> plan.partLog;
        place = column - (block << plan.partLog);
        isLive = ((block * kParts) << plan.partLog) < channels;
    }

    // One multiplication of 32 bits for each part.
    template <class T>
    __device__ T* at(T* row, int32_t part) const {
        uint32_t const stride = uint32_t{1} << plan.partLog;
        T* const first = row + ((block * kParts) << plan.partLog) + place;
        return first + static_cast<uint64_t>(stride) * static_cast<uint32_t>(part);
    }

    // One branch for all vectors.
    template <class Function>
    __device__ void forEachLive(Function function) const {
        if (isLive) {
#pragma unroll
            for (int32_t part = 0; part < kParts; ++part) {
                function(part);
            }
        }
    }

    __device__ void mix(float const (&values)[kVectors][kWidth], float (&mixed)[kMixed][kWidth],
                        float*) const {
#pragma unroll
        for (int32_t part = 0; part < kParts; ++part) {
#pragma unroll
            for (int32_t index = 0; index < kWidth; ++index) {
                mixed[part][index] = values[part][index];
            }
        }
        mixColumns<kBase, kJoin>(mixed);
    }

    __device__ void handOver(float const (&mixed)[kMixed][kWidth], float* shared) const {
        forEachLive([&](int32_t part) {
            storeVector(shared + plan.offsetOf(block, part, place), mixed[part]);
        });
    }
};

}  // namespace lrq
