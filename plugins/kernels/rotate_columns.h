// Rotate and quantize a token in one pass, its channels in registers: H = H_K (x) H_J (x) H_part.
//
// A block is K J parts of 2^m channels. Threads first hold columns, the same few places in all
// parts of a block, and mix them with H_K (x) H_J without talking to anyone. Then all values change
// hands once, through shared memory, and threads hold runs of 16 consecutive channels: H_part on
// them needs no shuffle for parts of 16 and one for every doubling, codes leave in whole vectors.
// Reading columns needs no exchange at all: 32 lanes read 32 neighbours.
#pragma once

#include "hadamard_columns.h"
#include "token_input.h"
#include "token_runs.h"

namespace lrq {

constexpr int32_t kBanks = 32;  // of shared memory, 4 bytes each

// How a block lies in shared memory, in floats. Four floats are left out after every 32, and after
// every part of 16: eight lanes that read a vector of eight neighbouring runs then meet all banks.
// Blocks of which half a warp writes a row each begin half the banks apart. Smaller parts, and
// columns 8 wide, meet in banks.
struct ExchangePlan {
    int32_t partLog;  // log2 of the channels of a part
    int32_t part;     // from one part to the next
    int32_t block;    // from one block to the next
};

LRQ_HOST_DEVICE constexpr int32_t padded(int32_t channel) {
    return channel + channel / 32 * 4;
}

LRQ_HOST_DEVICE constexpr ExchangePlan planExchange(int32_t parts, int32_t partLog) {
    int32_t const part = partLog == 4 ? kRun + 4 : padded(1 << partLog);
    bool const meets = partLog == 4 && parts * part % kBanks == 0;
    return {partLog, part, parts * part + (meets ? kBanks / 2 : 0)};
}

// kWidth neighbouring places in each of kBase kJoin parts. A kPartLog of 0 is one that only the
// launch knows.
template <int32_t kBase_, int32_t kJoin_, int32_t kWidth_, int32_t kPartLog, int32_t kMaxThreads_>
struct Columns {
    static constexpr int32_t kBase = kBase_;
    static constexpr int32_t kJoin = kJoin_;
    static constexpr int32_t kVectors = kBase * kJoin;
    static constexpr int32_t kWidth = kWidth_;
    static constexpr int32_t kValues = kVectors * kWidth;  // of a thread
    static constexpr int32_t kRuns = (kValues + kRun - 1) / kRun;
    static constexpr int32_t kMaxThreads = kMaxThreads_;

    // Every place of a part has a thread of its own where its size is not fixed, so one that many
    // threads hold is at most as wide as lanes of one warp can shuffle.
    static_assert(kPartLog > 0 || (kWidth == 1 && kMaxThreads < 2 * kWidestShuffled),
                  "a part is not shuffled across warps");

    // Powers of two with smaller parts are better off as runs.
    static constexpr bool takesPart(int32_t log) {
        return kPartLog > 0 ? log == kPartLog : kBase > 1 || log >= 4;
    }

    ExchangePlan plan;
    int32_t place;  // in a part
    int32_t block;  // of the token
    bool isLive;    // the token has it

    __device__ Columns(int32_t partLog, int32_t channels)
        : plan(planExchange(kVectors, kPartLog > 0 ? kPartLog : partLog)) {
        int32_t const column = kWidth * static_cast<int32_t>(threadIdx.x);
        block = column >> plan.partLog;
        place = column - (block << plan.partLog);
        isLive = ((block * kVectors) << plan.partLog) < channels;
    }

    // One multiplication of 32 bits for each part.
    template <class T>
    __device__ T* at(T* row, int32_t part) const {
        uint32_t const stride = uint32_t{1} << plan.partLog;
        T* const first = row + ((block * kVectors) << plan.partLog) + place;
        return first + static_cast<uint64_t>(stride) * static_cast<uint32_t>(part);
    }

    // One branch for all vectors.
    template <class Function>
    __device__ void forEachLive(Function function) const {
        if (isLive) {
#pragma unroll
            for (int32_t part = 0; part < kVectors; ++part) {
                function(part);
            }
        }
    }

    __device__ int32_t exchangedAt(int32_t part) const {
        return block * plan.block + part * plan.part + padded(place);
    }

    // Where the run that begins at `channel` lies, which is whole.
    __device__ int32_t exchangedRun(int32_t channel) const {
        int32_t const part = channel >> plan.partLog;  // of the token
        int32_t const within = channel - (part << plan.partLog);
        int32_t const gaps = part / kVectors * (plan.block - kVectors * plan.part);
        return part * plan.part + gaps + padded(within);
    }
};

// What the exchange of a token takes of shared memory.
template <class Layout>
constexpr int64_t exchangeBytes(int32_t partLog, int32_t channels) {
    int64_t const blocks = (channels >> partLog) / Layout::kVectors;
    return 4 * blocks * planExchange(Layout::kVectors, partLog).block;
}

template <class Layout>
__device__ inline void exchange(Layout const& columns, RunLayout<Layout::kRuns> const& runs,
                                float const (&values)[Layout::kVectors][Layout::kWidth],
                                float (&exchanged)[Layout::kRuns][kRun]) {
    float* const shared = sharedMemory<float>();
    columns.forEachLive([&](int32_t part) {
        storeVector(shared + columns.exchangedAt(part), values[part]);
    });
    synchronizeBlock();
    runs.forEachLive([&](int32_t run) {
        loadVector(shared + columns.exchangedRun(runs.channelOf(run)), exchanged[run]);
    });
}

template <class T, PrologueKind kKind, class Layout>
__global__ void __launch_bounds__(Layout::kMaxThreads)
    rotateColumns(RotateArguments const arguments, int32_t const partLog) {
    __shared__ float partials[3][kMaxWarps];
    Layout const columns(partLog, arguments.channels);
    RunLayout<Layout::kRuns> const runs{arguments.channels};
    int64_t const token = static_cast<int64_t>(blockIdx.x);
    float mixed[Layout::kVectors][Layout::kWidth];
    TokenInput<T, kKind, Layout>{arguments, columns, token, partials, mixed}.load();
    mixColumns<Layout::kBase, Layout::kJoin>(mixed);
    float values[Layout::kRuns][kRun];
    exchange(columns, runs, mixed, values);
    TokenRuns<T, Layout::kRuns>{arguments, runs, token, partials[2]}.finish(
        values, 1 << columns.plan.partLog);
}

}  // namespace lrq
