// Rotate and quantize a token in one pass, its channels in registers: H = H_K (x) H_J (x) H_part.
//
// A block is K J parts of 2^m channels. Threads first hold columns, the same few places in the parts
// of a block: reading them needs no exchange at all, 32 lanes read 32 neighbours. Once they are
// mixed, all values change hands through shared memory, and threads hold runs of 16 consecutive
// channels: H_part on them needs no shuffle for parts of 16 and one for every doubling, codes leave
// in whole vectors.
//
// A layout of columns has, beside what TokenInput asks for:
//
//     kParts, kMixed             parts of a block; vectors a thread holds once they are mixed
//     kMaxThreads, takesPart     what it is compiled for
//     sharedBytes, plan          what a token takes of shared memory; how values change hands in it
//     mix(values, mixed)         H_K (x) H_J along the parts, not yet divided by its root
//     handOver(mixed)            puts them where the plan says
#pragma once

#include "columns.h"
#include "split_columns.h"
#include "token_input.h"
#include "token_runs.h"

namespace lrq {

template <class T, PrologueKind kKind, class Layout>
__global__ void __launch_bounds__(Layout::kMaxThreads)
    rotateColumns(RotateArguments const arguments, int32_t const partLog) {
    constexpr int32_t kRuns = (Layout::kVectors * Layout::kWidth + kRun - 1) / kRun;
    __shared__ float partials[3][kMaxWarps];
    Layout const columns(partLog, arguments.channels);
    RunLayout<kRuns> const runs{arguments.channels};
    int64_t const token = static_cast<int64_t>(blockIdx.x);
    float values[Layout::kVectors][Layout::kWidth];
    TokenInput<T, kKind, Layout>{arguments, columns, token, partials, values}.load();
    float mixed[Layout::kMixed][Layout::kWidth];
    columns.mix(values, mixed);
    columns.handOver(mixed);
    synchronizeBlock();
    float exchanged[kRuns][kRun];
    runs.forEachLive([&](int32_t run) {
        int32_t const offset = columns.plan.offsetOfRun(runs.channelOf(run));
        loadVector(sharedMemory<float>() + offset, exchanged[run]);
    });
    TokenRuns<T, kRuns>{arguments, runs, token, partials[2]}.finish(
        exchanged, 1 << columns.plan.partLog);
}

}  // namespace lrq
