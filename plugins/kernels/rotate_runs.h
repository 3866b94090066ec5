// Rotate and quantize a token in one pass, its channels in registers as runs of 16 from the first
// load to the last store: for small blocks of 2^m channels, which need few shuffles, and for no
// rotation at all (a block of 1).
#pragma once

#include "token_input.h"
#include "token_runs.h"

namespace lrq {

template <class T, PrologueKind kKind, int32_t kRuns, int32_t kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) rotateRuns(RotateArguments const arguments) {
    __shared__ TokenThreads<1>::Partials partials[3];
    TokenThreads<1> const threads;
    RunLayout<kRuns> const layout(threads, arguments.channels);
    float values[kRuns][kRun];
    TokenInput<T, kKind, RunLayout<kRuns>, 1>{arguments, layout, threads, partials, values}.load();
    TokenRuns<T, kRuns, 1>{arguments, layout, threads, partials[2]}.finish(values, arguments.block);
}

}  // namespace lrq
