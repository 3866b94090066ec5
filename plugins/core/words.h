// How codes lie in memory: the index maps of both layouts, "storage" (graphs/ops/packing.py, sizes
// in formats.h) and "words" (graphs/ops/words.py), which the GPU kernels read. In words a row is
// whole units, and a unit the fewest 32-bit words that hold whole codes. A word is eight nibbles,
// nibble 0 in its lowest bits:
//
//     bits  codes  words  nibble i of each word                  bits 3..0 of the nibble
//     4     8      1      code i                                 [       c(i)        ]
//     3     32     3      A: code i, bit 0 of code 24 + i        [c(24+i).0 |  c(i)  ]
//                         B: code 8 + i, bit 1 of code 24 + i    [c(24+i).1 | c(8+i) ]
//                         C: code 16 + i, bit 2 of code 24 + i   [c(24+i).2 | c(16+i)]
//     2     16     1      codes 2 i and 2 i + 1                  [ c(2i+1) |  c(2i)  ]
#pragma once

#include <cstdint>

#include "formats.h"

namespace lrq {

constexpr int32_t kWordBytes = 4;
constexpr int32_t kNibbles = 8;           // of a word
constexpr int32_t kPlainCodes3 = 24;      // of a 3-bit unit: those that have a nibble of their own
constexpr int32_t kMaxUnitWords = 3;
constexpr int32_t kMaxUnitCodes = 32;

template <int32_t kBits>
struct Unit;

template <>
struct Unit<4> {
    static constexpr int32_t kWords = 1;
    static constexpr int32_t kCodes = 8;
    uint32_t words[kWords];
};

template <>
struct Unit<3> {
    static constexpr int32_t kWords = 3;
    static constexpr int32_t kCodes = 32;
    uint32_t words[kWords];  // A, B, C
};

template <>
struct Unit<2> {
    static constexpr int32_t kWords = 1;
    static constexpr int32_t kCodes = 16;
    uint32_t words[kWords];
};

template <int32_t kBits>
constexpr bool unitIsFull() {
    return sizeof(Unit<kBits>) == kWordBytes * Unit<kBits>::kWords &&
           kBits * Unit<kBits>::kCodes == 8 * static_cast<int32_t>(sizeof(Unit<kBits>)) &&
           alignof(Unit<kBits>) == kWordBytes;
}
static_assert(unitIsFull<4>() && unitIsFull<3>() && unitIsFull<2>(),
              "a unit is its words and every bit of them belongs to a code");

LRQ_HOST_DEVICE constexpr int32_t unitWords(int32_t bits) {
    return bits == 3 ? Unit<3>::kWords : 1;
}

LRQ_HOST_DEVICE constexpr int32_t unitCodes(int32_t bits) {
    return bits == 4 ? Unit<4>::kCodes : bits == 3 ? Unit<3>::kCodes : Unit<2>::kCodes;
}

// Units of one row; the codes that pad the last one are zero.
LRQ_HOST_DEVICE constexpr int64_t unitsPerRow(int32_t bits, int64_t cols) {
    return (cols + unitCodes(bits) - 1) / unitCodes(bits);
}

// Bytes of one row in words; rows follow each other without a gap.
LRQ_HOST_DEVICE constexpr int64_t wordsRowBytes(int32_t bits, int64_t cols) {
    return unitsPerRow(bits, cols) * unitWords(bits) * kWordBytes;
}
static_assert(wordsRowBytes(4, 9) == 8 && wordsRowBytes(3, 33) == 24 && wordsRowBytes(2, 16) == 4,
              "sizes as graphs/ops/words.py computes them");

// Bytes of all codes in either layout.
LRQ_HOST_DEVICE constexpr int64_t codesBytes(
    CodesLayout layout, int32_t bits, int64_t rows, int64_t cols) {
    return layout == CodesLayout::kWords ? rows * wordsRowBytes(bits, cols)
                                         : packedBytes(bits, rows, cols);
}

// Little-endian, wherever it lies.
LRQ_HOST_DEVICE inline uint32_t loadWord(uint8_t const* bytes) {
    return static_cast<uint32_t>(bytes[0]) | static_cast<uint32_t>(bytes[1]) << 8 |
           static_cast<uint32_t>(bytes[2]) << 16 | static_cast<uint32_t>(bytes[3]) << 24;
}

// Where bit `codeBit` of code `index` is within its unit, 0 the lowest bit of the first word.
LRQ_HOST_DEVICE constexpr int32_t unitBit(int32_t bits, int32_t index, int32_t codeBit) {
    if (bits == 2) {
        return 2 * index + codeBit;
    }
    bool const spread = bits == 3 && index >= kPlainCodes3;
    return spread ? 32 * codeBit + 4 * (index - kPlainCodes3) + 3 : 4 * index + codeBit;
}
static_assert(unitBit(3, 24, 0) == 3 && unitBit(3, 31, 2) == 95 && unitBit(3, 23, 2) == 94 &&
                  unitBit(4, 7, 3) == 31 && unitBit(2, 15, 1) == 31,
              "as the table above says");

// Where bit `codeBit` of the code at (row, col) is among all bits of codes in words.
LRQ_HOST_DEVICE constexpr int64_t wordsBit(
    int32_t bits, int64_t cols, int64_t row, int64_t col, int32_t codeBit) {
    int64_t const unit = row * unitsPerRow(bits, cols) + col / unitCodes(bits);
    int32_t const index = static_cast<int32_t>(col % unitCodes(bits));
    return unit * (32 * unitWords(bits)) + unitBit(bits, index, codeBit);
}

// The same in the storage layout, whose stream of bits starts at the low bit of byte 0.
LRQ_HOST_DEVICE constexpr int64_t storageBit(
    int32_t bits, int64_t cols, int64_t row, int64_t col, int32_t codeBit) {
    Layout const layout = layoutOf(bits);
    int32_t const plane = codeBit / layout.width;
    int64_t const element =
        (row * layout.planes + plane) * elementsPerRow(bits, cols) + col / layout.per;
    return element * (layout.width * layout.per) + (col % layout.per) * layout.width +
           codeBit % layout.width;
}

LRQ_HOST_DEVICE constexpr int64_t bitOfCode(
    CodesLayout layout, int32_t bits, int64_t cols, int64_t row, int64_t col, int32_t codeBit) {
    return layout == CodesLayout::kWords ? wordsBit(bits, cols, row, col, codeBit)
                                         : storageBit(bits, cols, row, col, codeBit);
}

// The code at (row, col) of codes in words. One code at a time: for what table_decode.h is not.
LRQ_HOST_DEVICE inline int32_t readWordsCode(
    uint8_t const* codes, int32_t bits, int64_t cols, int64_t row, int64_t col) {
    int32_t code = 0;
    for (int32_t codeBit = 0; codeBit < bits; ++codeBit) {
        int64_t const bit = wordsBit(bits, cols, row, col, codeBit);
        code |= ((codes[bit >> 3] >> (bit & 7)) & 1) << codeBit;
    }
    return code;
}

// ORs a code into codes in either layout that begin as zeros.
inline void writeCode(uint8_t* codes, CodesLayout layout, int32_t bits, int64_t cols, int64_t row,
                      int64_t col, int32_t code) {
    for (int32_t codeBit = 0; codeBit < bits; ++codeBit) {
        int64_t const bit = bitOfCode(layout, bits, cols, row, col, codeBit);
        codes[bit >> 3] |= static_cast<uint8_t>(((code >> codeBit) & 1) << (bit & 7));
    }
}

}  // namespace lrq
