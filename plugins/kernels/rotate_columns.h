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
//     kTokens                    tokens of a block
//     kMaxThreads, takesPart     what it is compiled for
//     sharedBytes, plan          what a token takes of shared memory; how values change hands in it
//     mix(values, mixed, ..)     H_K (x) H_J along the parts, not yet divided by its root
//     handOver(mixed, ..)        puts them where the plan says
#pragma once

#include "columns.h"
#include "split_columns.h"
#include "token_input.h"
#include "token_runs.h"

namespace lrq {

template <class T, PrologueKind kKind, class Layout>
__global__ void __launch_bounds__(Layout::kMaxThreads)
    rotateColumns(RotateArguments const arguments, int32_t const partLog) {
    constexpr int32_t kTokens = Layout::kTokens;
    constexpr int32_t kRuns = (Layout::kVectors * Layout::kWidth + kRun - 1) / kRun;
    __shared__ typename TokenThreads<kTokens>::Partials partials[3];
    TokenThreads<kTokens> const threads;
    bool const isThere = kTokens == 1 || threads.token < arguments.tokens;
    int32_t const channels = isThere ? arguments.channels : 0;
    Layout const columns(threads.thread, partLog, channels);
    RunLayout<kRuns> const runs(threads, channels);
    int32_t const pitch =
        static_cast<int32_t>(Layout::sharedBytes(partLog, arguments.channels) / sizeof(float));
    float* const shared = sharedMemory<float>() + threads.index * pitch;
    float values[Layout::kVectors][Layout::kWidth];
    TokenInput<T, kKind, Layout, kTokens>{arguments, columns, threads, partials, values}.load();
    float mixed[Layout::kMixed][Layout::kWidth];
    columns.mix(values, mixed, shared);
    columns.handOver(mixed, shared);
    synchronizeBlock();
    float exchanged[kRuns][kRun];
    runs.forEachLive([&](int32_t run) {
        loadVector(shared + columns.plan.offsetOfRun(runs.channelOf(run)), exchanged[run]);
    });
    TokenRuns<T, kRuns, kTokens>{arguments, runs, threads, partials[2]}.finish(
        exchanged, 1 << columns.plan.partLog);
}

}  // namespace lrq
