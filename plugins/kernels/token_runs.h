// The end of a rotation in registers: runs of 16 consecutive channels in each thread, which are
// rotated among themselves and the runs of lanes beside them, rounded, and stored as T or as codes
// in vectors of 16 bytes.
#pragma once

#include "../core/hadamard.h"
#include "../core/table_decode.h"
#include "element.h"
#include "quantize.h"
#include "rotate_quantize.h"
#include "token_threads.h"

namespace lrq {

constexpr int32_t kRun = 16;  // channels
constexpr int32_t kWidestShuffled = kRun * kWarp;

// Runs of a token: neighbours in neighbouring threads.
template <int32_t kRuns>
struct RunLayout {
    static constexpr int32_t kVectors = kRuns;
    static constexpr int32_t kWidth = kRun;

    int32_t channels;  // none of a token that is not there
    int32_t threads;
    int32_t thread;

    template <int32_t kTokens>
    __device__ RunLayout(TokenThreads<kTokens> const& token, int32_t channels)
        : channels(channels), threads(token.count), thread(token.thread) {}

    __device__ int32_t channelOf(int32_t run) const {
        return kRun * (run * threads + thread);
    }

    template <class T>
    __device__ T* at(T* row, int32_t run) const {
        return row + channelOf(run);
    }

    template <class Function>
    __device__ void forEachLive(Function function) const {
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
            if (channelOf(run) < channels) {
                function(run);
            }
        }
    }
};

// One stage of the butterfly within a run.
__device__ inline void joinRun(float (&values)[kRun], int32_t half) {
#pragma unroll
    for (int32_t index = 0; index < kRun; ++index) {
        if ((index & half) == 0) {
            butterfly(values[index], values[index + half]);
        }
    }
}

// H of 2^m = size on the values of a run and those of the lanes beside it, not yet divided by
// sqrt(size): log2(size) - 4 shuffles for each element.
__device__ inline void rotateRun(float (&values)[kRun], int32_t size) {
    if (size >= kRun) {
#pragma unroll
        for (int32_t half = 1; half < kRun; half *= 2) {
            joinRun(values, half);
        }
    } else {  // without the choice in each stage, the usual sizes need no moves between registers
#pragma unroll
        for (int32_t half = 1; half < kRun / 2; half *= 2) {
            if (half < size) {
                joinRun(values, half);
            }
        }
    }
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    for (int32_t half = kRun; half < size; half *= 2) {
        int32_t const mask = half / kRun;
        float const own = (lane & mask) == 0 ? 1.0f : -1.0f;
#pragma unroll
        for (int32_t index = 0; index < kRun; ++index) {
            values[index] = multiplyAdd(own, values[index], shuffleXor(values[index], mask));
        }
    }
}

template <bool kIsFast>
__device__ inline void storeCodes(
    int8_t* address, float const (&run)[kRun], TokenQuantizer const& quantizer) {
    uint32_t words[kRun / 4];
#pragma unroll
    for (int32_t word = 0; word < kRun / 4; ++word) {
        uint32_t code[4];
#pragma unroll
        for (int32_t index = 0; index < 4; ++index) {
            code[index] = quantizeAs<kIsFast>(run[4 * word + index], quantizer);
        }
        // The low byte of each of four words, two permutations and one that joins them.
        uint32_t const low = permuteBytes(code[0], code[1], 0x0040);
        uint32_t const high = permuteBytes(code[2], code[3], 0x0040);
        words[word] = permuteBytes(low, high, 0x5410);
    }
    *reinterpret_cast<uint4*>(address) = {words[0], words[1], words[2], words[3]};
}

// The runs of a token, rotated up to H of 2^m = `size` channels.
template <class T, int32_t kRuns, int32_t kTokens>
struct TokenRuns {
    RotateArguments const& arguments;
    RunLayout<kRuns> layout;
    TokenThreads<kTokens> const& threads;
    typename TokenThreads<kTokens>::Partials& partials;

    // Rounded to T, as a tensor between two nodes would be: so a rotation that quantizes and one
    // that a quantizing node follows give the same codes.
    __device__ void finish(float (&values)[kRuns][kRun], int32_t size) const {
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
            rotateRun(values[run], size);
#pragma unroll
            for (int32_t index = 0; index < kRun; index += 2) {
                values[run][index] *= arguments.root;
                values[run][index + 1] *= arguments.root;
                roundTwo<T>(values[run][index], values[run][index + 1]);
            }
        }
        if (arguments.limit == 0) {
            store(values);
        } else {
            storeQuantized(values);
        }
    }

    __device__ void store(float const (&values)[kRuns][kRun]) const {
        T* const row = static_cast<T*>(arguments.y) + threads.token * arguments.channels;
        layout.forEachLive(
            [&](int32_t run) { storeVector(layout.at(row, run), values[run]); });
    }

    __device__ void storeQuantized(float const (&values)[kRuns][kRun]) const {
        float peak = 0.0f;
        layout.forEachLive([&](int32_t run) {
#pragma unroll
            for (int32_t index = 0; index < kRun; ++index) {
                peak = fmaxf(peak, fabsf(values[run][index]));
            }
        });
        peak = threads.peak(peak, partials);
        TokenQuantizer const quantizer = makeQuantizer(peak, arguments.limit);
        int8_t* const row = static_cast<int8_t*>(arguments.y) + threads.token * arguments.channels;
        layout.forEachLive([&](int32_t run) {
            if (quantizer.isFast) {
                storeCodes<true>(layout.at(row, run), values[run], quantizer);
            } else {
                storeCodes<false>(layout.at(row, run), values[run], quantizer);
            }
        });
        if (threads.thread == 0 && layout.channels > 0) {
            arguments.tokenScales[threads.token] = quantizer.scale;
        }
    }
};

}  // namespace lrq
