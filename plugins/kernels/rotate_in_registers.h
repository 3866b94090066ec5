// Rotate and quantize a token in one pass, its channels in registers: x is read once and the codes
// are written once, three bytes an element for 2-byte T. For blocks of 2^m channels up to 512.
//
// A thread owns runs of 16 consecutive channels: vectors of 16 bytes in and out. A block of H spans
// block / 16 neighbouring lanes, so stages of a butterfly that join channels less than 16 apart
// stay in a thread and the others are shuffles: log2(block) - 4 for each element.
#pragma once

#include "../core/activations.h"
#include "../core/hadamard.h"
#include "../core/table_decode.h"
#include "element.h"
#include "quantize.h"
#include "rotate_quantize.h"

namespace lrq {

constexpr int32_t kRun = 16;       // channels
constexpr int32_t kWarp = 32;      // lanes
constexpr int32_t kMaxWarps = 32;  // of a block
constexpr int32_t kWidestBlock = kRun * kWarp;

// What is computed before the rotation, as far as the code for it differs: which of a kind it is,
// is asked at run time, by all threads alike.
enum class PrologueKind { kNone, kNorm, kActivation };

constexpr PrologueKind kindOf(Prologue prologue) {
    return prologue == Prologue::kNone ? PrologueKind::kNone
           : isNorm(prologue)          ? PrologueKind::kNorm
                                       : PrologueKind::kActivation;
}

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

__device__ inline float activate(Prologue prologue, float x) {
    switch (prologue) {
        case Prologue::kGelu:
            return gelu(x);
        case Prologue::kGeluTanh:
            return geluTanh(x);
        default:
            return silu(x);
    }
}

// One stage of the butterfly within a run.
__device__ inline void joinRun(float (&values)[kRun], int32_t half) {
#pragma unroll
    for (int32_t index = 0; index < kRun; ++index) {
        if ((index & half) == 0) {
            butterfly(values[index], values[index + half]);
        }
    }
}

// H of 2^m on the values of a run and those of the lanes beside it, not yet divided by sqrt(block).
__device__ inline void rotateRun(float (&values)[kRun], int32_t block) {
    if (block >= kRun) {
#pragma unroll
        for (int32_t half = 1; half < kRun; half *= 2) {
            joinRun(values, half);
        }
    } else {  // without the choice in each stage, the usual blocks need no moves between registers
#pragma unroll
        for (int32_t half = 1; half < kRun / 2; half *= 2) {
            if (half < block) {
                joinRun(values, half);
            }
        }
    }
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    for (int32_t half = kRun; half < block; half *= 2) {
        int32_t const mask = half / kRun;
        float const own = (lane & mask) == 0 ? 1.0f : -1.0f;
#pragma unroll
        for (int32_t index = 0; index < kRun; ++index) {
            values[index] = multiplyAdd(own, values[index], shuffleXor(values[index], mask));
        }
    }
}

template <class T, PrologueKind kKind, int32_t kRuns>
struct RotatedToken {
    RotateArguments const& arguments;
    int64_t token;
    float (*partials)[kMaxWarps];
    float values[kRuns][kRun];

    __device__ int32_t channelOf(int32_t run) const {
        return kRun * static_cast<int32_t>(run * blockDim.x + threadIdx.x);
    }

    // Whether this thread has channels in its run; where not, its values stay 0.
    __device__ bool isLive(int32_t run) const {
        return channelOf(run) < arguments.channels;
    }

    __device__ void load() {
        int64_t const width =
            arguments.prologue == static_cast<int32_t>(Prologue::kGeglu) ? 2 : 1;
        T const* const row =
            static_cast<T const*>(arguments.x) + token * width * arguments.channels;
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
#pragma unroll
            for (int32_t index = 0; index < kRun; ++index) {
                values[run][index] = 0.0f;
            }
            if (isLive(run)) {
                loadRun(row + channelOf(run), values[run]);
                if constexpr (kKind == PrologueKind::kActivation) {
                    activateRun(row + channelOf(run), values[run]);
                }
            }
        }
        if constexpr (kKind == PrologueKind::kNorm) {
            normalize();
        }
    }

    __device__ void activateRun(T const* address, float (&run)[kRun]) const {
        Prologue const prologue = static_cast<Prologue>(arguments.prologue);
        if (prologue == Prologue::kGeglu) {
            float gate[kRun];
            loadRun(address + arguments.channels, gate);
#pragma unroll
            for (int32_t index = 0; index < kRun; ++index) {
                run[index] = geglu(run[index], gate[index]);
            }
            return;
        }
#pragma unroll
        for (int32_t index = 0; index < kRun; ++index) {
            run[index] = activate(prologue, run[index]);
        }
    }

    __device__ void normalize() {
        float const count = static_cast<float>(arguments.channels);
        if (arguments.prologue == static_cast<int32_t>(Prologue::kLayerNorm)) {
            float const mean = sumOver([](float value) { return value; }, 0) / count;
            forEachLive([mean](float value) { return value - mean; });
        }
        float const meanSquare = sumOver([](float value) { return value * value; }, 1) / count;
        float const factor = inverseNorm(meanSquare, arguments.epsilon);
        forEachLive([factor](float value) { return value * factor; });
        modulate();
    }

    __device__ void modulate() {
        T const* const scaleRow = arguments.scale.rowOf<T>(token);
        T const* const shiftRow = arguments.shift.rowOf<T>(token);
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
            if (isLive(run)) {
                float scale[kRun];
                float shift[kRun];
                loadRun(scaleRow + channelOf(run), scale);
                loadRun(shiftRow + channelOf(run), shift);
#pragma unroll
                for (int32_t index = 0; index < kRun; ++index) {
                    values[run][index] = values[run][index] * scale[index] + shift[index];
                }
            }
        }
    }

    template <class Function>
    __device__ float sumOver(Function function, int32_t slot) {
        float sum = 0.0f;
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
#pragma unroll
            for (int32_t index = 0; index < kRun; ++index) {
                sum += function(values[run][index]);  // 0 where no channel is
            }
        }
        return reduceBlock<Add>(sum, partials[slot]);
    }

    template <class Function>
    __device__ void forEachLive(Function function) {
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
            if (isLive(run)) {
#pragma unroll
                for (int32_t index = 0; index < kRun; ++index) {
                    values[run][index] = function(values[run][index]);
                }
            }
        }
    }

    // Rounded to T at the end, as a tensor between two nodes would be: so a rotation that quantizes
    // and one that a quantizing node follows give the same codes.
    __device__ void rotate() {
        T const* const signs = static_cast<T const*>(arguments.signs);
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
            if (signs != nullptr && isLive(run)) {
                float sign[kRun];
                loadRun(signs + channelOf(run), sign);
#pragma unroll
                for (int32_t index = 0; index < kRun; ++index) {
                    values[run][index] *= sign[index];
                }
            }
            rotateRun(values[run], arguments.block);
#pragma unroll
            for (int32_t index = 0; index < kRun; ++index) {
                values[run][index] = roundedTo<T>(values[run][index] * arguments.root);
            }
        }
    }

    __device__ void store() const {
        T* const row = static_cast<T*>(arguments.y) + token * arguments.channels;
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
            if (isLive(run)) {
                storeRun(row + channelOf(run), values[run]);
            }
        }
    }

    __device__ void storeQuantized() {
        float peak = 0.0f;
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
#pragma unroll
            for (int32_t index = 0; index < kRun; ++index) {
                peak = fmaxf(peak, fabsf(values[run][index]));
            }
        }
        peak = reduceBlock<Max>(peak, partials[2]);
        TokenQuantizer const quantizer = makeQuantizer(peak, arguments.limit);
        int8_t* const row = static_cast<int8_t*>(arguments.y) + token * arguments.channels;
#pragma unroll
        for (int32_t run = 0; run < kRuns; ++run) {
            if (isLive(run) && quantizer.isFast) {
                storeCodes<true>(row + channelOf(run), values[run], quantizer);
            } else if (isLive(run)) {
                storeCodes<false>(row + channelOf(run), values[run], quantizer);
            }
        }
        if (threadIdx.x == 0) {
            arguments.tokenScales[token] = quantizer.scale;
        }
    }

    template <bool kIsFast>
    __device__ static void storeCodes(
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
};

template <class T, PrologueKind kKind, int32_t kRuns, int32_t kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) rotateInRegisters(RotateArguments const arguments) {
    __shared__ float partials[3][kMaxWarps];
    RotatedToken<T, kKind, kRuns> token{
        arguments, static_cast<int64_t>(blockIdx.x), partials, {}};
    token.load();
    token.rotate();
    if (arguments.limit == 0) {
        token.store();
    } else {
        token.storeQuantized();
    }
}

}  // namespace lrq
