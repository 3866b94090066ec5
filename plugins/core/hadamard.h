// Hadamard matrices H = H_K (x) H_2^m and their fast transform: graphs/ops/hadamard.py in C++.
//
// For a prime q let Q (q, q) be Q[i, j] = chi(i - j) with chi the quadratic character mod q, and C
// (q + 1, q + 1) be Q bordered by ones: C = [[0, 1^T], [e 1, Q]]. Paley's two constructions are
//
//     I  (q = 3 mod 4): e = -1, H_K = C + I                   of size q + 1
//     II (q = 1 mod 4): e = +1, H_K = C (x) A + I (x) B       of size 2 (q + 1)
//
// with A = [[1, 1], [1, -1]], B = [[1, -1], [-1, -1]]. q = 0 gives [1]. H_2^m is Sylvester's,
// H[i, j] = (-1)^popcount(i & j). Matrices here are of +-1; a rotation divides by sqrt(block).
#pragma once

#include <cstdint>

#include "formats.h"

namespace lrq {

constexpr int32_t kMaxHadamardBase = 256;          // K
constexpr int32_t kMaxHadamardBlock = 256 * 256;   // K 2^m

// H_K, small enough to be a kernel's argument. Bit r of `squares` says whether r is a square mod q.
struct HadamardBase {
    int32_t size;   // K
    int32_t order;  // q
    uint32_t squares[kMaxHadamardBase / 32];
};

// block = base.size * power
struct HadamardFactors {
    HadamardBase base;
    int32_t power;  // 2^m
};

constexpr bool isPrime(int32_t number) {
    if (number < 2) {
        return false;
    }
    for (int32_t divisor = 2; divisor * divisor <= number; ++divisor) {
        if (number % divisor == 0) {
            return false;
        }
    }
    return true;
}

// Whether H_K of `size` is built here from the prime `order`.
constexpr bool isHadamardBase(int32_t size, int32_t order) {
    if (order == 0) {
        return size == 1;
    }
    if (size > kMaxHadamardBase || order < 0 || order >= kMaxHadamardBase || !isPrime(order)) {
        return false;
    }
    return (order % 4 == 3 && size == order + 1) || (order % 4 == 1 && size == 2 * (order + 1));
}

// Requires isHadamardBase(size, order).
constexpr HadamardBase makeHadamardBase(int32_t size, int32_t order) {
    HadamardBase base{size, order, {}};
    for (int32_t root = 1; root < order; ++root) {
        int32_t const square = root * root % order;
        base.squares[square / 32] |= uint32_t{1} << (square % 32);
    }
    return base;
}

// Whether `block` has a Hadamard matrix; *factors, the smallest base and a power of two, if so.
constexpr bool factorizeHadamard(int64_t block, HadamardFactors* factors) {
    if (block < 1 || block > kMaxHadamardBlock) {
        return false;
    }
    int32_t const size = static_cast<int32_t>(block);
    int32_t const odd = size / (size & -size);
    if (odd == 1) {
        *factors = {makeHadamardBase(1, 0), size};
        return true;
    }
    for (int32_t base = 4 * odd; base <= kMaxHadamardBase && size % base == 0; base *= 2) {
        for (int32_t copies = 1; copies <= 2; ++copies) {
            int32_t const order = base / copies - 1;
            if (isHadamardBase(base, order)) {
                *factors = {makeHadamardBase(base, order), size / base};
                return true;
            }
        }
    }
    return false;
}

// H_K[row, col], +1 or -1, for 0 <= row, col < K.
LRQ_HOST_DEVICE constexpr int32_t hadamardEntry(
    HadamardBase const& base, int32_t row, int32_t col) {
    int32_t const copiesLog = base.size > base.order + 1 ? 1 : 0;
    int32_t const i = row >> copiesLog;
    int32_t const j = col >> copiesLog;
    int32_t const a = row & copiesLog;  // within A and B
    int32_t const b = col & copiesLog;
    if (i == j) {
        return (a | b) != 0 ? -1 : 1;
    }
    int32_t const cornerSign = (a & b) != 0 ? -1 : 1;
    if (i == 0) {
        return cornerSign;
    }
    if (j == 0) {
        return copiesLog != 0 ? cornerSign : -cornerSign;
    }
    int32_t const difference = i > j ? i - j : i - j + base.order;
    bool const square = (base.squares[difference / 32] >> (difference % 32) & 1) != 0;
    return square ? cornerSign : -cornerSign;
}

constexpr bool rowsAreOrthogonal(HadamardBase const& base, int32_t left, int32_t right) {
    int32_t sum = 0;
    for (int32_t col = 0; col < base.size; ++col) {
        sum += hadamardEntry(base, left, col) * hadamardEntry(base, right, col);
    }
    return sum == (left == right ? base.size : 0);
}
static_assert(rowsAreOrthogonal(makeHadamardBase(12, 11), 0, 7) &&
                  rowsAreOrthogonal(makeHadamardBase(36, 17), 3, 20) &&
                  rowsAreOrthogonal(makeHadamardBase(36, 17), 5, 5),
              "H H^T = K I");

// One stage joins entries `half` apart; stages for half = 1, 2, 4, ... in any order are x H_2^m.
LRQ_HOST_DEVICE inline void butterfly(float& left, float& right) {
    float const sum = left + right;
    right = left - right;
    left = sum;
}

// values (size,) times H_size of +-1, in place; size is a power of two.
LRQ_HOST_DEVICE inline void butterflies(float* values, int32_t size) {
    for (int32_t half = 1; half < size; half *= 2) {
        for (int32_t index = 0; index < size; ++index) {
            if ((index & half) == 0) {
                butterfly(values[index], values[index + half]);
            }
        }
    }
}

// x (block,) times H / sqrt(block) in place, for a scale of 1 / sqrt(block); scratch (base.size,).
inline void hadamardTransform(
    float* x, HadamardFactors const& factors, float scale, float* scratch) {
    HadamardBase const& base = factors.base;
    int32_t const power = factors.power;
    for (int32_t row = 0; row < base.size; ++row) {
        butterflies(x + row * power, power);
    }
    for (int32_t col = 0; col < power; ++col) {
        for (int32_t to = 0; to < base.size; ++to) {
            float sum = 0.0f;
            for (int32_t from = 0; from < base.size; ++from) {
                float const value = x[from * power + col];
                sum += hadamardEntry(base, from, to) > 0 ? value : -value;
            }
            scratch[to] = sum * scale;
        }
        for (int32_t to = 0; to < base.size; ++to) {
            x[to * power + col] = scratch[to];
        }
    }
}

}  // namespace lrq
