// From packed codes to INT8 weights, by shifts; and per-token quantization of activations.
//
// With F = fraction bits, I = integer bits, q the magnitude index of a code:
//     v = base + step q,  f = v >> F,  r = v & (2^F - 1)
//     m = SHIFT(M[r], f - I) - offset,  M[r] = round(2^(r / 2^F + I)),  right shifts round half up
// and w = +-m by the code's sign bit. Every function here is defined for any value of its integer
// arguments that its comment allows; what is read from a file passes checkExponents first, or is
// decoded by decodeWeightClamped.
#pragma once

#include <cmath>
#include <cstdint>

#include "formats.h"

namespace lrq {

// F and I with their mantissas M[0 .. 2^F - 1], made once on the host by makeMantissas.
struct Mantissas {
    int32_t fractionBits;
    int32_t integerBits;
    int32_t values[kMaxMantissas];
};

inline bool validMantissaBits(int32_t fractionBits, int32_t integerBits) {
    return fractionBits >= 0 && fractionBits <= kMaxFractionBits && integerBits >= 0 &&
           integerBits <= kMaxIntegerBits;
}

// Requires validMantissaBits(fractionBits, integerBits).
inline Mantissas makeMantissas(int32_t fractionBits, int32_t integerBits) {
    Mantissas mantissas{fractionBits, integerBits, {}};
    int32_t const steps = 1 << fractionBits;
    for (int32_t r = 0; r < steps; ++r) {
        double const exponent = static_cast<double>(r) / steps + integerBits;
        mantissas.values[r] = static_cast<int32_t>(std::lround(std::exp2(exponent)));
    }
    return mantissas;
}

// The code at (row, col) of packed codes. The stream of bits starts at the low bit of byte 0.
LRQ_HOST_DEVICE inline int32_t readCode(
    uint8_t const* packed, int32_t bits, int64_t cols, int64_t row, int64_t col) {
    Layout const layout = layoutOf(bits);
    int64_t const elements = elementsPerRow(bits, cols);
    int32_t const elementBits = layout.width * layout.per;
    int32_t const fieldMask = (1 << layout.width) - 1;
    int32_t code = 0;
    for (int32_t plane = 0; plane < layout.planes; ++plane) {
        int64_t const element = (row * layout.planes + plane) * elements + col / layout.per;
        int64_t const bit = element * elementBits + (col % layout.per) * layout.width;
        int32_t const field = (packed[bit >> 3] >> (bit & 7)) & fieldMask;
        code |= field << (layout.width * plane);
    }
    return code;
}

// The magnitude m for index q, 0 <= q < 8. Valid weights have it in 0..127; for any other exponents
// the result is some integer outside that range: shifts are limited to what can matter.
LRQ_HOST_DEVICE inline int32_t decodeLevel(
    SideExponents exponents, int32_t q, Mantissas const& mantissas) {
    int32_t const v = exponents.base + exponents.step * q;
    // >> of a negative v rounds down on every compiler we build with; C++20 makes it the rule.
    int32_t const octave = v >> mantissas.fractionBits;
    int32_t const fraction = v & ((1 << mantissas.fractionBits) - 1);
    int32_t const mantissa = mantissas.values[fraction];
    int32_t const shift = octave - mantissas.integerBits;
    if (shift >= 0) {
        int32_t const left = shift < kMaxLeftShift ? shift : kMaxLeftShift;
        return (mantissa << left) - exponents.offset;
    }
    // M <= 2^(I + 1): from a right shift by I + 3 on, the rounded result is 0.
    int32_t const last = mantissas.integerBits + 3;
    int32_t const right = -shift < last ? -shift : last;
    return ((mantissa + (1 << (right - 1))) >> right) - exponents.offset;
}

// The integer weight of a code. Requires exponents that pass checkExponents.
LRQ_HOST_DEVICE inline int8_t decodeWeight(
    GroupExponents const& group, int32_t code, int32_t bits, Mantissas const& mantissas) {
    int32_t const sign = code >> (bits - 1);
    int32_t const q = code & ((1 << (bits - 1)) - 1);
    int32_t const level = decodeLevel(group.sides[sign], q, mantissas);
    return static_cast<int8_t>(sign != 0 ? -level : level);
}

LRQ_HOST_DEVICE inline int32_t clampLevel(int32_t level) {
    return level > kMaxLevel ? kMaxLevel : level < -kMaxLevel ? -kMaxLevel : level;
}

// decodeWeight for exponents that nobody checked, as on a GPU: the same number for valid ones, and
// one in -127..127 for any others.
LRQ_HOST_DEVICE inline int8_t decodeWeightClamped(
    GroupExponents const& group, int32_t code, int32_t bits, Mantissas const& mantissas) {
    int32_t const sign = code >> (bits - 1);
    int32_t const q = code & ((1 << (bits - 1)) - 1);
    int32_t const level = clampLevel(decodeLevel(group.sides[sign], q, mantissas));
    return static_cast<int8_t>(sign != 0 ? -level : level);
}

// Whether every step is >= 0 and every level in 0..127.
LRQ_HOST_DEVICE inline bool checkExponents(
    GroupExponents const& group, int32_t bits, Mantissas const& mantissas) {
    for (SideExponents const& side : group.sides) {
        if (side.step < 0) {
            return false;
        }
        for (int32_t q = 0; q < (1 << (bits - 1)); ++q) {
            int32_t const level = decodeLevel(side, q, mantissas);
            if (level < 0 || level > kMaxLevel) {
                return false;
            }
        }
    }
    return true;
}

// table[code] = decodeWeight(code) for all 2^bits codes.
LRQ_HOST_DEVICE inline void expandTable(
    GroupExponents const& group, int32_t bits, Mantissas const& mantissas, int8_t* table) {
    for (int32_t code = 0; code < (1 << bits); ++code) {
        table[code] = decodeWeight(group, code, bits, mantissas);
    }
}

// The largest activation code of `actBits` bits: 127 for 8, 31 for 6.
LRQ_HOST_DEVICE inline int32_t activationLimit(int32_t actBits) {
    return (1 << (actBits - 1)) - 1;
}

// s = max|x| / limit; 1 for a token of zeros, whose codes are then all zero.
LRQ_HOST_DEVICE inline float tokenScale(float peak, int32_t limit) {
    float const scale = peak / static_cast<float>(limit);
    return scale > 0.0f ? scale : 1.0f;
}

// clamp(round half to even(x / s)). A NaN becomes -limit: defined, and as wrong as its input.
LRQ_HOST_DEVICE inline int8_t quantizeActivation(float x, float scale, int32_t limit) {
    float const bound = static_cast<float>(limit);
    float const rounded = rintf(x / scale);
    return static_cast<int8_t>(fminf(fmaxf(rounded, -bound), bound));
}

// y = (acc * s_token) * s_row + bias, each step rounded to float: on the host, compile without
// contraction.
LRQ_HOST_DEVICE inline float dequantizeSum(
    int32_t sum, float tokenScale, float rowScale, float bias) {
#if defined(__CUDA_ARCH__)
    float const inTokens = __fmul_rn(static_cast<float>(sum), tokenScale);
    return __fadd_rn(__fmul_rn(inTokens, rowScale), bias);
#else
    return static_cast<float>(sum) * tokenScale * rowScale + bias;
#endif
}

// residual + gate * y, the end of a branch of a transformer block: two roundings to float.
LRQ_HOST_DEVICE inline float addGated(float y, float gate, float residual) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(residual, __fmul_rn(gate, y));
#else
    return residual + gate * y;
#endif
}

}  // namespace lrq
