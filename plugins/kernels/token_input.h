// What a rotation is applied to: a token's channels in the registers of a block's threads, after
// the prologue and the signs. x is read once. Which channels a thread holds is a Layout's to say:
//
//     kVectors, kWidth    vectors a thread holds, and consecutive channels of each
//     channelOf(vector)   the first channel of a vector
//     isLive(vector)      whether the token has these channels; where not, the values are 0
#pragma once

#include "../core/activations.h"
#include "element.h"
#include "reduce_block.h"
#include "rotate_quantize.h"

namespace lrq {

// What is computed before the rotation, as far as the code for it differs: which of a kind it is,
// is asked at run time, by all threads alike.
enum class PrologueKind { kNone, kNorm, kActivation };

constexpr PrologueKind kindOf(Prologue prologue) {
    return prologue == Prologue::kNone ? PrologueKind::kNone
           : isNorm(prologue)          ? PrologueKind::kNorm
                                       : PrologueKind::kActivation;
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

template <class T, PrologueKind kKind, class Layout>
struct TokenInput {
    static constexpr int32_t kVectors = Layout::kVectors;
    static constexpr int32_t kWidth = Layout::kWidth;

    RotateArguments const& arguments;
    Layout const& layout;
    int64_t token;
    float (*partials)[kMaxWarps];  // two rows
    float values[kVectors][kWidth];

    __device__ void load() {
        int64_t const width =
            arguments.prologue == static_cast<int32_t>(Prologue::kGeglu) ? 2 : 1;
        T const* const row =
            static_cast<T const*>(arguments.x) + token * width * arguments.channels;
#pragma unroll
        for (int32_t vector = 0; vector < kVectors; ++vector) {
#pragma unroll
            for (int32_t index = 0; index < kWidth; ++index) {
                values[vector][index] = 0.0f;
            }
            if (layout.isLive(vector)) {
                loadVector(row + layout.channelOf(vector), values[vector]);
                if constexpr (kKind == PrologueKind::kActivation) {
                    activateVector(row + layout.channelOf(vector), values[vector]);
                }
            }
        }
        if constexpr (kKind == PrologueKind::kNorm) {
            normalize();
        }
        flipSigns();
    }

    __device__ void activateVector(T const* address, float (&vector)[kWidth]) const {
        Prologue const prologue = static_cast<Prologue>(arguments.prologue);
        if (prologue == Prologue::kGeglu) {
            float gate[kWidth];
            loadVector(address + arguments.channels, gate);
#pragma unroll
            for (int32_t index = 0; index < kWidth; ++index) {
                vector[index] = geglu(vector[index], gate[index]);
            }
            return;
        }
#pragma unroll
        for (int32_t index = 0; index < kWidth; ++index) {
            vector[index] = activate(prologue, vector[index]);
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
        for (int32_t vector = 0; vector < kVectors; ++vector) {
            if (layout.isLive(vector)) {
                float scale[kWidth];
                float shift[kWidth];
                loadVector(scaleRow + layout.channelOf(vector), scale);
                loadVector(shiftRow + layout.channelOf(vector), shift);
#pragma unroll
                for (int32_t index = 0; index < kWidth; ++index) {
                    values[vector][index] = values[vector][index] * scale[index] + shift[index];
                }
            }
        }
    }

    __device__ void flipSigns() {
        T const* const signs = static_cast<T const*>(arguments.signs);
        if (signs == nullptr) {
            return;
        }
#pragma unroll
        for (int32_t vector = 0; vector < kVectors; ++vector) {
            if (layout.isLive(vector)) {
                float sign[kWidth];
                loadVector(signs + layout.channelOf(vector), sign);
#pragma unroll
                for (int32_t index = 0; index < kWidth; ++index) {
                    values[vector][index] *= sign[index];
                }
            }
        }
    }

    template <class Function>
    __device__ float sumOver(Function function, int32_t slot) {
        float sum = 0.0f;
#pragma unroll
        for (int32_t vector = 0; vector < kVectors; ++vector) {
#pragma unroll
            for (int32_t index = 0; index < kWidth; ++index) {
                sum += function(values[vector][index]);  // 0 where no channel is
            }
        }
        return reduceBlock<Add>(sum, partials[slot]);
    }

    template <class Function>
    __device__ void forEachLive(Function function) {
#pragma unroll
        for (int32_t vector = 0; vector < kVectors; ++vector) {
            if (layout.isLive(vector)) {
#pragma unroll
                for (int32_t index = 0; index < kWidth; ++index) {
                    values[vector][index] = function(values[vector][index]);
                }
            }
        }
    }
};

}  // namespace lrq
