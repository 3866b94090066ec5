// Hadamard matrices on what one thread holds: values of the same place in all parts of a block.
//
// H_K of a Paley matrix has no butterflies, but four of its inputs have only eight sums up to sign:
// those are made once, 12 additions, and every output picks one of them. K outputs so take
// 3 K + K (K / 4 - 1) additions instead of K (K - 1): 5 for each of 12, 11 for each of 36.
#pragma once

#include <utility>

#include "../core/hadamard.h"
#include "device.h"

namespace lrq {

constexpr HadamardBase hadamardBaseOf(int32_t size) {
    HadamardFactors factors{};
    return factorizeHadamard(size, &factors) ? factors.base : HadamardBase{};
}

template <int32_t kBase>
constexpr HadamardBase kHadamardBase = hadamardBaseOf(kBase);

// Signs of H_K's entries at rows from .. from + 3 of a column: bit 3 that of the first, bits 0 to 2
// whether those after it differ from it.
constexpr int32_t signsOfFour(HadamardBase const& base, int32_t from, int32_t to) {
    int32_t const first = hadamardEntry(base, from, to);
    int32_t signs = first < 0 ? 8 : 0;
    for (int32_t next = 1; next < 4; ++next) {
        signs |= hadamardEntry(base, from + next, to) != first ? 1 << (next - 1) : 0;
    }
    return signs;
}

// sums[s] = x0 +- x1 +- x2 +- x3, x_i subtracted where bit i - 1 of s is set.
__device__ inline void sumFour(float const (&x)[4], float (&sums)[8]) {
#pragma unroll
    for (int32_t signs = 0; signs < 8; ++signs) {
        float const left = (signs & 1) == 0 ? x[0] + x[1] : x[0] - x[1];
        float const right = (signs >> 1 & 1) == (signs >> 2 & 1) ? x[2] + x[3] : x[2] - x[3];
        sums[signs] = (signs >> 1 & 1) == 0 ? left + right : left - right;
    }
}

template <int32_t kSigns, bool kIsFirst>
__device__ inline void addSigned(float const (&sums)[8], float& y) {
    constexpr bool kIsNegative = kSigns >= 8;
    float const sum = sums[kSigns % 8];
    if constexpr (kIsFirst) {
        y = kIsNegative ? -sum : sum;
    } else {
        y = kIsNegative ? y - sum : y + sum;
    }
}

// y[0], y[1], ... += what outputs kTo... of H_K have of inputs kFrom .. kFrom + 3, which `four` holds.
template <int32_t kBase, int32_t kFrom, int32_t kOutputs, int32_t... kTo>
__device__ inline void addFour(float const (&four)[4], float (&y)[kOutputs],
                               std::integer_sequence<int32_t, kTo...>) {
    float sums[8];
    sumFour(four, sums);
    (addSigned<signsOfFour(kHadamardBase<kBase>, kFrom, kTo), kFrom == 0>(sums, y[kTo]), ...);
}

// y (K,) = x (K,) H_K, all in registers; K is a multiple of 4.
template <int32_t kBase, int32_t... kFours>
__device__ inline void multiplyBase(float const (&x)[kBase], float (&y)[kBase],
                                    std::integer_sequence<int32_t, kFours...>) {
    (addFour<kBase, 4 * kFours>(
         {x[4 * kFours], x[4 * kFours + 1], x[4 * kFours + 2], x[4 * kFours + 3]}, y,
         std::make_integer_sequence<int32_t, kBase>{}),
     ...);
}

// Rows and columns of H_K around its cycle: it is C + I of Paley's first construction, whose cycle
// is of single entries, or C (x) A + I (x) B of the second, where it is of pairs.
template <int32_t kBase>
constexpr int32_t kHadamardBorder = kBase - (kBase / (kHadamardBase<kBase>.order + 1)) *
                                                kHadamardBase<kBase>.order;

// Outputs of x (K,) H_K: those of the border, then `shift` behind them those that follow in the
// cycle. What they have of inputs as far behind is the same for every shift that is a multiple of 4,
// so inputs are read from there on, around the cycle's end.
template <int32_t kBase, int32_t kOutputs, int32_t... kFours>
__device__ inline void multiplyCycle(float const* x, int32_t shift, float (&y)[kOutputs],
                                     std::integer_sequence<int32_t, kFours...>) {
    constexpr int32_t kBorder = kHadamardBorder<kBase>;
    auto const addFrom = [&](auto constant) {
        constexpr int32_t kFrom = decltype(constant)::value;
        int32_t const behind = shift + kFrom < kBase ? shift : shift - (kBase - kBorder);
        float four[4];
#pragma unroll
        for (int32_t index = 0; index < 4; ++index) {
            bool const isBorder = kFrom + index < kBorder;
            four[index] = x[kFrom + index + (isBorder ? 0 : behind)];
        }
        addFour<kBase, kFrom>(four, y, std::make_integer_sequence<int32_t, kOutputs>{});
    };
    (addFrom(std::integral_constant<int32_t, 4 * kFours>{}), ...);
}

template <int32_t kBase, int32_t kOutputs>
__device__ inline void multiplyCycle(float const* x, int32_t shift, float (&y)[kOutputs]) {
    multiplyCycle<kBase>(x, shift, y, std::make_integer_sequence<int32_t, kBase / 4>{});
}

// values (kBase kJoin, kWidth) times H_kBase (x) H_kJoin along the first axis, not yet divided by
// its root. kBase is 1 or a Paley size, kJoin a power of two.
template <int32_t kBase, int32_t kJoin, int32_t kWidth>
__device__ inline void mixColumns(float (&values)[kBase * kJoin][kWidth]) {
#pragma unroll
    for (int32_t half = 1; half < kJoin; half *= 2) {
#pragma unroll
        for (int32_t vector = 0; vector < kBase * kJoin; ++vector) {
#pragma unroll
            for (int32_t index = 0; index < kWidth; ++index) {
                if ((vector & half) == 0) {
                    butterfly(values[vector][index], values[vector + half][index]);
                }
            }
        }
    }
    if constexpr (kBase > 1) {
#pragma unroll
        for (int32_t column = 0; column < kJoin * kWidth; ++column) {
            int32_t const join = column / kWidth;
            int32_t const index = column % kWidth;
            float x[kBase];
            float y[kBase];
#pragma unroll
            for (int32_t row = 0; row < kBase; ++row) {
                x[row] = values[row * kJoin + join][index];
            }
            multiplyBase<kBase>(x, y, std::make_integer_sequence<int32_t, kBase / 4>{});
#pragma unroll
            for (int32_t row = 0; row < kBase; ++row) {
                values[row * kJoin + join][index] = y[row];
            }
        }
    }
}

}  // namespace lrq
