// What is computed from x before it is rotated: the prologues of graphs/ops/*_rotate.py, in float.
#pragma once

#include <cmath>
#include <cstdint>

#include "formats.h"

namespace lrq {

enum class Prologue : int32_t {
    kNone = 0,       // HadamardRotate
    kLayerNorm = 1,  // LayerNormRotate
    kRmsNorm = 2,    // RMSNormRotate
    kGelu = 3,       // GeluRotate
    kGeluTanh = 4,   // GeluTanhRotate
    kSilu = 5,       // SiluRotate
    kGeglu = 6,      // GegluRotate: x has 2 * channels, the gate in the second half
};

LRQ_HOST_DEVICE constexpr bool isNorm(Prologue prologue) {
    return prologue == Prologue::kLayerNorm || prologue == Prologue::kRmsNorm;
}

// x Phi(x) = x (1 + erf(x / sqrt(2))) / 2; erfc keeps its digits far below zero, 1 + erf does not.
LRQ_HOST_DEVICE inline float gelu(float x) {
    return 0.5f * x * erfcf(-0.707106781f * x);
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
LRQ_HOST_DEVICE inline float geluTanh(float x) {
    float const inner = 0.797884561f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

// x / (1 + exp(-x)): exp overflows to infinity far below zero, where the result is -0.
LRQ_HOST_DEVICE inline float silu(float x) {
    return x / (1.0f + expf(-x));
}

LRQ_HOST_DEVICE inline float geglu(float hidden, float gate) {
    return hidden * gelu(gate);
}

// 1 / sqrt(mean(x^2) + epsilon) of a token; a norm multiplies by it (x - mean(x) for LayerNorm).
LRQ_HOST_DEVICE inline float inverseNorm(float meanSquare, float epsilon) {
    return 1.0f / sqrtf(meanSquare + epsilon);
}

}  // namespace lrq
