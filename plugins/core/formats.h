// How twin-log weights lie in memory, shared by the reference loops, the CUDA kernels and the
// plugins. The same truth as graphs/ops/packing.py and graphs/ops/twin_log_dequant.py, which the
// tests of tests/plugins hold against this file bit for bit.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LRQ_HOST_DEVICE __host__ __device__
#else
#define LRQ_HOST_DEVICE
#endif

namespace lrq {

constexpr int32_t kMaxLevel = 127;         // |w| fits INT8 with a sign
constexpr int32_t kMaxFractionBits = 7;    // F: exponents are in units of 2^-F
constexpr int32_t kMaxIntegerBits = 8;     // I: mantissas carry I bits before they are shifted
constexpr int32_t kMaxMantissas = 1 << kMaxFractionBits;
constexpr int32_t kMaxTableSize = 1 << 4;  // 2^bits
// M >= 1, so a shift by 8 is beyond kMaxLevel plus the largest offset, and so is any larger one.
constexpr int32_t kMaxLeftShift = 8;

// Keeps every index and byte count of a weight far inside int64.
constexpr int64_t kMaxDimension = int64_t{1} << 24;
// The widest product whose sum stays inside int32 for any INT8 codes, -128 included.
constexpr int64_t kMaxProductCols = INT32_MAX / (128 * 128);

enum class Status : int32_t {
    kOk = 0,
    kNullPointer = 1,
    kBadBits = 2,      // bits, fraction_bits, integer_bits or act_bits out of range
    kBadSize = 3,      // a dimension out of range, or a buffer of the wrong size
    kBadGroup = 4,     // group_size does not divide cols
    kBadLevels = 5,    // a negative step, or a level outside 0..127; -128 in a table
    kBadFormat = 6,    // a format, layout, prologue or type that does not exist
    kBadBlock = 7,     // block has no Hadamard matrix, or does not divide the channels
    kBadValue = 8,     // a negative or not finite epsilon
};

// One side (+ or -) of a group, as stored: v = base + step * q in units of 2^-F.
struct SideExponents {
    int8_t base;
    int8_t step;
    int8_t offset;
};
static_assert(sizeof(SideExponents) == 3, "exponents are stored as (rows, groups, 2, 3) INT8");

struct GroupExponents {
    SideExponents sides[2];  // [0]: positive, [1]: negative; indexed by the sign bit of a code
};
static_assert(sizeof(GroupExponents) == 6, "exponents are stored as (rows, groups, 2, 3) INT8");

// Where codes lie: graphs/ops/packing.py or graphs/ops/words.py (words.h).
enum class CodesLayout : int32_t { kStorage = 0, kWords = 1 };

// What the integers of a weight are made of: graphs/ops/twin_log_dequant.py, codebook_dequant.py,
// int8_dequant.py.
enum class Format : int32_t { kTwinLog = 0, kCodebook = 1, kInt8 = 2 };

// Packed codes are (rows, planes, elements); an element holds `per` fields of `width` bits, low
// first, and plane p holds bits [width * p, width * (p + 1)) of every code.
struct Layout {
    int32_t planes;
    int32_t width;
    int32_t per;
};

LRQ_HOST_DEVICE constexpr bool hasLayout(int32_t bits) {
    return bits == 2 || bits == 3 || bits == 4;
}

// 4 bits: one INT4 each; 3 bits: three bit planes of INT8; 2 bits: four codes an INT8.
LRQ_HOST_DEVICE constexpr Layout layoutOf(int32_t bits) {
    return bits == 4 ? Layout{1, 4, 1} : bits == 3 ? Layout{3, 1, 8} : Layout{1, 2, 4};
}

constexpr bool fieldsCoverElements(int32_t bits) {
    return layoutOf(bits).planes * layoutOf(bits).width == bits &&
           8 % (layoutOf(bits).width * layoutOf(bits).per) == 0;
}
static_assert(fieldsCoverElements(2) && fieldsCoverElements(3) && fieldsCoverElements(4),
              "a field must never straddle two bytes");

// Elements of one plane of one row; the last one may be padded with zero codes.
LRQ_HOST_DEVICE constexpr int64_t elementsPerRow(int32_t bits, int64_t cols) {
    return (cols + layoutOf(bits).per - 1) / layoutOf(bits).per;
}

// Bytes of all packed codes. INT4 elements are two a byte, without padding between rows.
LRQ_HOST_DEVICE constexpr int64_t packedBytes(int32_t bits, int64_t rows, int64_t cols) {
    return (rows * layoutOf(bits).planes * elementsPerRow(bits, cols) * layoutOf(bits).width *
                layoutOf(bits).per + 7) / 8;
}
static_assert(packedBytes(4, 3, 3) == 5 && packedBytes(3, 2, 9) == 12 && packedBytes(2, 2, 5) == 4,
              "sizes as graphs/ops/packing.py computes them");

}  // namespace lrq
