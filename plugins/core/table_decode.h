// Codes to INT8 weights a word at a time: what the GPU kernels do, with each instruction's
// host twin, so that a CPU test proves it. A table of 2^bits INT8 levels lies in registers, and one
// byte permutation (PRMT) looks four codes up at once, because its selector is a word of nibbles.
//
// Results come as words of four INT8 in code order: little-endian, so storing them one behind the
// other gives a row-major weight.
#pragma once

#include <cstdint>

#include "decode.h"
#include "words.h"

namespace lrq {

// PRMT: byte i of the result is byte s of {high, low}, s = bits 2..0 of nibble i of `selectors`;
// where bit 3 of that nibble is set, it is the sign of that byte, eight times. The upper half of
// `selectors` is not read. No selector made in this file has a bit 3.
LRQ_HOST_DEVICE inline uint32_t permuteBytes(uint32_t low, uint32_t high, uint32_t selectors) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, selectors);
#else
    uint64_t const bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t result = 0;
    for (int32_t index = 0; index < 4; ++index) {
        uint32_t const selector = selectors >> (4 * index) & 15;
        uint32_t const byte = static_cast<uint32_t>(bytes >> (8 * (selector & 7))) & 0xff;
        uint32_t const sign = (byte & 0x80) != 0 ? 0xff : 0;
        result |= ((selector & 8) != 0 ? sign : byte) << (8 * index);
    }
    return result;
#endif
}

// -128 becomes -127 in each of four INT8.
LRQ_HOST_DEVICE inline uint32_t clampBytes(uint32_t word) {
#if defined(__CUDA_ARCH__)
    return __vmaxs4(word, 0x81818181u);
#else
    // A byte is 0x80 just where it has bit 7 and no other: then add one.
    uint32_t const low = (word & 0x7f7f7f7fu) + 0x7f7f7f7fu;
    return word + ((word & ~low & 0x80808080u) >> 7);
#endif
}

// table[code], four entries a word, low byte first. 4 bits: entries 0..7 are the positive side.
template <int32_t kBits>
struct LookupTable {
    static constexpr int32_t kWords = (1 << kBits) / 4;
    uint32_t words[kWords];
};
static_assert(sizeof(LookupTable<4>) == 16 && sizeof(LookupTable<3>) == 8 &&
                  sizeof(LookupTable<2>) == 4,
              "one byte an entry, as tables (rows, groups, 2^bits) are stored");

// The table of a twin-log group, whatever its exponents: see decodeWeightClamped.
template <int32_t kBits>
LRQ_HOST_DEVICE inline LookupTable<kBits> makeTable(
    GroupExponents const& group, Mantissas const& mantissas) {
    LookupTable<kBits> table{};
    for (int32_t code = 0; code < (1 << kBits); ++code) {
        uint32_t const level =
            static_cast<uint8_t>(decodeWeightClamped(group, code, kBits, mantissas));
        table.words[code / 4] |= level << (8 * (code % 4));
    }
    return table;
}

// The table of a codebook group from its 2^bits stored bytes; -128 is not a level.
template <int32_t kBits>
LRQ_HOST_DEVICE inline LookupTable<kBits> loadTable(int8_t const* levels) {
    LookupTable<kBits> table{};
    for (int32_t word = 0; word < LookupTable<kBits>::kWords; ++word) {
        uint8_t const* const bytes = reinterpret_cast<uint8_t const*>(levels) + kWordBytes * word;
        table.words[word] = clampBytes(loadWord(bytes));
    }
    return table;
}

// levels[0..1], eight INT8, of the eight codes in the nibbles of `codes`; a nibble is < 2^bits.
template <int32_t kBits>
LRQ_HOST_DEVICE inline void lookUp(
    LookupTable<kBits> const& table, uint32_t codes, uint32_t* levels) {
    static_assert(kBits == 4 || kBits == 3 || kBits == 2, "no layout has other codes");
    if constexpr (kBits == 4) {
        // Both sides by the low three bits of a code, then byte i of one of them by its sign bit.
        uint32_t const index = codes & 0x77777777u;
        uint32_t const side = ((codes & 0x88888888u) | 0x64206420u) >> 1;
        for (int32_t half = 0; half < 2; ++half) {
            uint32_t const positive =
                permuteBytes(table.words[0], table.words[1], index >> (16 * half));
            uint32_t const negative =
                permuteBytes(table.words[2], table.words[3], index >> (16 * half));
            levels[half] = permuteBytes(positive, negative, side >> (16 * half));
        }
    } else {
        uint32_t const high = table.words[LookupTable<kBits>::kWords - 1];
        levels[0] = permuteBytes(table.words[0], high, codes);
        levels[1] = permuteBytes(table.words[0], high, codes >> 16);
    }
}

// The eight codes of a 3-bit unit that are spread over the top bits of the nibbles of A, B and C.
LRQ_HOST_DEVICE inline uint32_t spreadCodes(Unit<3> const& unit) {
    return (unit.words[0] >> 3 & 0x11111111u) | (unit.words[1] >> 2 & 0x22222222u) |
           (unit.words[2] >> 1 & 0x44444444u);
}

// levels, kCodes INT8 in kCodes / 4 words, of a unit of the words layout. For 4 and 2 bits a word
// of the storage layout that begins at a whole byte is the same.
LRQ_HOST_DEVICE inline void decodeUnit(
    LookupTable<4> const& table, Unit<4> const& unit, uint32_t* levels) {
    lookUp(table, unit.words[0], levels);
}

LRQ_HOST_DEVICE inline void decodeUnit(
    LookupTable<3> const& table, Unit<3> const& unit, uint32_t* levels) {
    for (int32_t word = 0; word < Unit<3>::kWords; ++word) {
        lookUp(table, unit.words[word] & 0x77777777u, levels + 2 * word);
    }
    lookUp(table, spreadCodes(unit), levels + 2 * Unit<3>::kWords);
}

LRQ_HOST_DEVICE inline void decodeUnit(
    LookupTable<2> const& table, Unit<2> const& unit, uint32_t* levels) {
    uint32_t even[2];
    uint32_t odd[2];
    lookUp(table, unit.words[0] & 0x33333333u, even);
    lookUp(table, unit.words[0] >> 2 & 0x33333333u, odd);
    for (int32_t half = 0; half < 2; ++half) {
        levels[2 * half] = permuteBytes(even[half], odd[half], 0x5140);
        levels[2 * half + 1] = permuteBytes(even[half], odd[half], 0x7362);
    }
}

// Bit i of a byte becomes bit 0 of nibble i.
LRQ_HOST_DEVICE constexpr uint32_t spreadBits(uint8_t byte) {
    uint32_t spread = byte;
    spread = (spread | spread << 12) & 0x000f000fu;
    spread = (spread | spread << 6) & 0x03030303u;
    return (spread | spread << 3) & 0x11111111u;
}
static_assert(spreadBits(0x81) == 0x10000001u && spreadBits(0xff) == 0x11111111u,
              "bit i goes to nibble i");

// levels[0..1], eight INT8, of the eight 3-bit codes of one byte of each plane (storage layout).
LRQ_HOST_DEVICE inline void decodePlanes(
    LookupTable<3> const& table, uint8_t plane0, uint8_t plane1, uint8_t plane2,
    uint32_t* levels) {
    lookUp(table, spreadBits(plane0) | spreadBits(plane1) << 1 | spreadBits(plane2) << 2, levels);
}

}  // namespace lrq
