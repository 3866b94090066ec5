// What a rotation is applied to: a token's channels in the registers of a block's threads, after
// the prologue and the signs. x is read once. Which channels a thread holds is a Layout's to say:
//
//     kVectors, kWidth        vectors a thread holds, and consecutive channels of each
//     at(row, vector)         where a vector lies in a row of channels
//     forEachLive(function)   calls it with every vector the token has; others may hold anything
#pragma once

#include "../core/activations.h"
#include "element.h"
#include "rotate_quantize.h"
#include "token_threads.h"

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

template <class T, PrologueKind kKind, class Layout, int32_t kTokens>
struct TokenInput {
    static constexpr int32_t kVectors = Layout::kVectors;
    static constexpr int32_t kWidth = Layout::kWidth;

    RotateArguments const& arguments;
    Layout const& layout;
    TokenThreads<kTokens> const& threads;
    typename TokenThreads<kTokens>::Partials (&partials)[3];  // the last is not used
    float (&values)[kVectors][kWidth];

    __device__ void load() {
        int64_t const width =
            arguments.prologue == static_cast<int32_t>(Prologue::kGeglu) ? 2 : 1;
        T const* const row =
            static_cast<T const*>(arguments.x) + threads.token * width * arguments.channels;
        layout.forEachLive(
            [&](int32_t vector) { loadVector(layout.at(row, vector), values[vector]); });
        if constexpr (kKind == PrologueKind::kActivation) {
            activateAll(row + arguments.channels);
        }
        if constexpr (kKind == PrologueKind::kNorm) {
            normalize();
        }
        if (arguments.signs != nullptr) {
            multiply(static_cast<T const*>(arguments.signs));
        }
    }

    __device__ void activateAll(T const* gates) {
        Prologue const prologue = static_cast<Prologue>(arguments.prologue);
        if (prologue == Prologue::kGeglu) {
            combine(gates, [](float value, float gate) { return geglu(value, gate); });
            return;
        }
        replaceLive([prologue](float value) { return activate(prologue, value); });
    }

    __device__ void normalize() {
        float const count = static_cast<float>(arguments.channels);
        if (arguments.prologue == static_cast<int32_t>(Prologue::kLayerNorm)) {
            float const mean = sumOver([](float value) { return value; }, 0) / count;
            replaceLive([mean](float value) { return value - mean; });
        }
        float const meanSquare = sumOver([](float value) { return value * value; }, 1) / count;
        float const factor = inverseNorm(meanSquare, arguments.epsilon);
        replaceLive([factor](float value) { return value * factor; });
        multiply(arguments.scale.rowOf<T>(static_cast<int32_t>(threads.token)));
        combine(arguments.shift.rowOf<T>(static_cast<int32_t>(threads.token)),
                [](float value, float term) { return value + term; });
    }

    // Each value joined with the one of its channel in a row.
    template <class Function>
    __device__ void combine(T const* row, Function join) {
        layout.forEachLive([&](int32_t vector) {
            float others[kWidth];
            loadVector(layout.at(row, vector), others);
#pragma unroll
            for (int32_t index = 0; index < kWidth; ++index) {
                values[vector][index] = join(values[vector][index], others[index]);
            }
        });
    }

    __device__ void multiply(T const* row) {
        combine(row, [](float value, float factor) { return value * factor; });
    }

    template <class Function>
    __device__ float sumOver(Function function, int32_t slot) {
        float sum = 0.0f;
        layout.forEachLive([&](int32_t vector) {
#pragma unroll
            for (int32_t index = 0; index < kWidth; ++index) {
                sum += function(values[vector][index]);
            }
        });
        return threads.sum(sum, partials[slot]);
    }

    template <class Function>
    __device__ void replaceLive(Function function) {
        layout.forEachLive([&](int32_t vector) {
#pragma unroll
            for (int32_t index = 0; index < kWidth; ++index) {
                values[vector][index] = function(values[vector][index]);
            }
        });
    }
};

}  // namespace lrq
