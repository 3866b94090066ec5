// Codes and the integers they stand for: graphs/ops/packing.py, words.py, coded_weight.py.
#include <cstring>

#include "c_api.h"
#include "c_api_checks.h"
#include "decode.h"
#include "table_decode.h"
#include "words.h"

namespace lrq {
namespace {

constexpr int32_t kInt8Bits = 8;

Format formatOf(LrqPackedWeight const& weight) {
    return static_cast<Format>(weight.format);
}

CodesLayout codesLayoutOf(LrqPackedWeight const& weight) {
    return static_cast<CodesLayout>(weight.layout);
}

int64_t groupsPerRow(LrqPackedWeight const& weight) {
    return weight.cols / weight.groupSize;
}

int64_t groupLevels(Format format, int32_t bits) {
    return format == Format::kTwinLog ? static_cast<int64_t>(sizeof(GroupExponents)) : 1 << bits;
}

// The stored levels of one group, counted over all rows.
int8_t const* levelsAt(LrqPackedWeight const& weight, int64_t group) {
    return weight.levels + group * groupLevels(formatOf(weight), weight.bits);
}

GroupExponents exponentsAt(LrqPackedWeight const& weight, int64_t group) {
    int8_t const* const field = levelsAt(weight, group);
    return {{{field[0], field[1], field[2]}, {field[3], field[4], field[5]}}};
}

Mantissas mantissasOf(LrqPackedWeight const& weight) {
    bool const twinLog = formatOf(weight) == Format::kTwinLog;
    return twinLog ? makeMantissas(weight.fractionBits, weight.integerBits) : Mantissas{};
}

Status checkInt8(LrqPackedWeight const& weight) {
    if (weight.bits != kInt8Bits) {
        return Status::kBadBits;
    }
    bool const exact = weight.codesBytes == weight.rows * weight.cols && weight.levelsBytes == 0;
    return exact ? Status::kOk : Status::kBadSize;
}

Status checkCodes(LrqPackedWeight const* weight) {
    if (weight == nullptr || weight->codes == nullptr) {
        return Status::kNullPointer;
    }
    bool const isInt8 = weight->format == static_cast<int32_t>(Format::kInt8);
    bool const isCoded = weight->format == static_cast<int32_t>(Format::kTwinLog) ||
                         weight->format == static_cast<int32_t>(Format::kCodebook);
    if ((!isInt8 && !isCoded) || !isLayout(weight->layout) ||
        (isInt8 && codesLayoutOf(*weight) != CodesLayout::kStorage)) {
        return Status::kBadFormat;
    }
    if (isCoded && !hasLayout(weight->bits)) {
        return Status::kBadBits;
    }
    if (!inRange(weight->rows) || !inRange(weight->cols)) {
        return Status::kBadSize;
    }
    if (isInt8) {
        return checkInt8(*weight);
    }
    int64_t const needed =
        codesBytes(codesLayoutOf(*weight), weight->bits, weight->rows, weight->cols);
    return weight->codesBytes == needed ? Status::kOk : Status::kBadSize;
}

// Everything but the values of the levels.
Status checkWeight(LrqPackedWeight const* weight) {
    Status const codes = checkCodes(weight);
    if (codes != Status::kOk || formatOf(*weight) == Format::kInt8) {
        return codes;
    }
    if (weight->levels == nullptr) {
        return Status::kNullPointer;
    }
    if (formatOf(*weight) == Format::kTwinLog &&
        !validMantissaBits(weight->fractionBits, weight->integerBits)) {
        return Status::kBadBits;
    }
    if (weight->groupSize <= 0 || weight->cols % weight->groupSize != 0) {
        return Status::kBadGroup;
    }
    int64_t const groups = weight->rows * groupsPerRow(*weight);
    int64_t const needed = groups * groupLevels(formatOf(*weight), weight->bits);
    return weight->levelsBytes == needed ? Status::kOk : Status::kBadSize;
}

// Requires a weight that passes checkWeight.
Status checkLevels(LrqPackedWeight const& weight, Mantissas const& mantissas) {
    int64_t const groups = weight.rows * groupsPerRow(weight);
    for (int64_t group = 0; group < groups; ++group) {
        bool const valid =
            formatOf(weight) == Format::kTwinLog
                ? checkExponents(exponentsAt(weight, group), weight.bits, mantissas)
                : std::memchr(levelsAt(weight, group), -kMaxLevel - 1, size_t{1} << weight.bits) ==
                      nullptr;
        if (!valid) {
            return Status::kBadLevels;
        }
    }
    return Status::kOk;
}

// Everything, of a weight that has codes: what decodes without clamping needs.
Status checkCodedWeight(LrqPackedWeight const* weight) {
    Status const status = checkWeight(weight);
    if (status != Status::kOk) {
        return status;
    }
    if (formatOf(*weight) == Format::kInt8) {
        return Status::kBadFormat;
    }
    return checkLevels(*weight, mantissasOf(*weight));
}

int32_t codeAt(LrqPackedWeight const& weight, int64_t row, int64_t col) {
    uint8_t const* const codes = static_cast<uint8_t const*>(weight.codes);
    return codesLayoutOf(weight) == CodesLayout::kWords
               ? readWordsCode(codes, weight.bits, weight.cols, row, col)
               : readCode(codes, weight.bits, weight.cols, row, col);
}

// table (2^bits,) of one group whose levels are valid.
void tableOf(LrqPackedWeight const& weight, int64_t group, Mantissas const& mantissas,
             int8_t* table) {
    if (formatOf(weight) == Format::kTwinLog) {
        expandTable(exponentsAt(weight, group), weight.bits, mantissas, table);
    } else {
        std::memcpy(table, levelsAt(weight, group), size_t{1} << weight.bits);
    }
}

// decoded (rows, cols) = decode(code) for every code, in row-major order; startGroup(group) comes
// before the first code of each group.
template <class StartGroup, class Decode>
void forEachCode(
    LrqPackedWeight const& weight, StartGroup startGroup, Decode decode, int8_t* decoded) {
    for (int64_t row = 0; row < weight.rows; ++row) {
        for (int64_t col = 0; col < weight.cols; ++col) {
            if (col % weight.groupSize == 0) {
                startGroup(row * groupsPerRow(weight) + col / weight.groupSize);
            }
            decoded[row * weight.cols + col] = decode(codeAt(weight, row, col));
        }
    }
}

template <int32_t kBits>
LookupTable<kBits> lookupTable(
    LrqPackedWeight const& weight, int64_t group, Mantissas const& mantissas) {
    return formatOf(weight) == Format::kTwinLog
               ? makeTable<kBits>(exponentsAt(weight, group), mantissas)
               : loadTable<kBits>(levelsAt(weight, group));
}

// The 32 bits from `bit` on, which begins a nibble; zeros behind the end of the codes.
uint32_t storageWord(LrqPackedWeight const& weight, int64_t bit) {
    uint8_t bytes[kWordBytes + 1] = {};
    int64_t const first = bit / 8;
    int64_t const left = weight.codesBytes - first;
    int64_t const size = static_cast<int64_t>(sizeof(bytes));
    std::memcpy(bytes, static_cast<uint8_t const*>(weight.codes) + first,
                static_cast<size_t>(left < size ? left : size));
    return bit % 8 == 0 ? loadWord(bytes) : loadWord(bytes) >> 4 | uint32_t{bytes[4]} << 28;
}

// Codes that are decoded together: a unit, or a byte of each plane.
constexpr int64_t chunkCodes(CodesLayout layout, int32_t bits) {
    return layout == CodesLayout::kStorage && bits == 3 ? 8 : unitCodes(bits);
}

// levels of the chunk that begins at (row, col), col a multiple of chunkCodes.
template <int32_t kBits>
void decodeChunk(LrqPackedWeight const& weight, int64_t row, int64_t col,
                 LookupTable<kBits> const& table, uint32_t* levels) {
    uint8_t const* const codes = static_cast<uint8_t const*>(weight.codes);
    if (codesLayoutOf(weight) == CodesLayout::kWords) {
        uint8_t const* const bytes = codes + wordsBit(kBits, weight.cols, row, col, 0) / 8;
        Unit<kBits> unit{};
        for (int32_t word = 0; word < Unit<kBits>::kWords; ++word) {
            unit.words[word] = loadWord(bytes + kWordBytes * word);
        }
        decodeUnit(table, unit, levels);
    } else if constexpr (kBits == 3) {
        uint8_t planes[3];
        for (int32_t plane = 0; plane < 3; ++plane) {
            planes[plane] = codes[storageBit(kBits, weight.cols, row, col, plane) / 8];
        }
        decodePlanes(table, planes[0], planes[1], planes[2], levels);
    } else {
        int64_t const bit = storageBit(kBits, weight.cols, row, col, 0);
        decodeUnit(table, Unit<kBits>{{storageWord(weight, bit)}}, levels);
    }
}

int8_t byteOf(uint32_t const* words, int64_t index) {
    return static_cast<int8_t>(words[index / kWordBytes] >> (8 * (index % kWordBytes)) & 0xff);
}

// A chunk that straddles groups is decoded once with the table of each.
template <int32_t kBits>
void decodeByWords(LrqPackedWeight const& weight, int8_t* decoded) {
    int64_t const chunk = chunkCodes(codesLayoutOf(weight), kBits);
    Mantissas const mantissas = mantissasOf(weight);
    uint32_t levels[kMaxUnitCodes / kWordBytes];
    for (int64_t row = 0; row < weight.rows; ++row) {
        int64_t col = 0;
        while (col < weight.cols) {
            int64_t const group = col / weight.groupSize;
            int64_t const groupEnd = (group + 1) * weight.groupSize;
            LookupTable<kBits> const table =
                lookupTable<kBits>(weight, row * groupsPerRow(weight) + group, mantissas);
            for (int64_t begin = col / chunk * chunk; begin < groupEnd; begin += chunk) {
                decodeChunk(weight, row, begin, table, levels);
                for (; col < begin + chunk && col < groupEnd; ++col) {
                    decoded[row * weight.cols + col] = byteOf(levels, col - begin);
                }
            }
        }
    }
}

}  // namespace
}  // namespace lrq

int32_t lrqPackCodes(uint8_t const* codes, int64_t rows, int64_t cols, int32_t bits, int32_t layout,
                     uint8_t* packed, int64_t packedBytes) {
    if (codes == nullptr || packed == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    if (!lrq::isLayout(layout)) {
        return lrq::code(lrq::Status::kBadFormat);
    }
    if (!lrq::hasLayout(bits)) {
        return lrq::code(lrq::Status::kBadBits);
    }
    lrq::CodesLayout const form = static_cast<lrq::CodesLayout>(layout);
    if (!lrq::inRange(rows) || !lrq::inRange(cols) ||
        packedBytes != lrq::codesBytes(form, bits, rows, cols)) {
        return lrq::code(lrq::Status::kBadSize);
    }
    std::memset(packed, 0, static_cast<size_t>(packedBytes));
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
            lrq::writeCode(packed, form, bits, cols, row, col, codes[row * cols + col]);
        }
    }
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqUnpackCodes(LrqPackedWeight const* weight, uint8_t* codes) {
    lrq::Status const status = lrq::checkCodes(weight);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    if (lrq::formatOf(*weight) == lrq::Format::kInt8) {
        return lrq::code(lrq::Status::kBadFormat);
    }
    if (codes == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    for (int64_t row = 0; row < weight->rows; ++row) {
        for (int64_t col = 0; col < weight->cols; ++col) {
            codes[row * weight->cols + col] =
                static_cast<uint8_t>(lrq::codeAt(*weight, row, col));
        }
    }
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqDecodeByShifts(LrqPackedWeight const* weight, int8_t* decoded) {
    lrq::Status const status = lrq::checkCodedWeight(weight);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    if (lrq::formatOf(*weight) != lrq::Format::kTwinLog) {
        return lrq::code(lrq::Status::kBadFormat);
    }
    if (decoded == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    lrq::Mantissas const mantissas = lrq::mantissasOf(*weight);
    lrq::GroupExponents exponents{};
    lrq::forEachCode(
        *weight, [&](int64_t group) { exponents = lrq::exponentsAt(*weight, group); },
        [&](int32_t code) { return lrq::decodeWeight(exponents, code, weight->bits, mantissas); },
        decoded);
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqDecodeByTable(LrqPackedWeight const* weight, int8_t* decoded) {
    lrq::Status const status = lrq::checkCodedWeight(weight);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    if (decoded == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    lrq::Mantissas const mantissas = lrq::mantissasOf(*weight);
    int8_t table[lrq::kMaxTableSize];
    lrq::forEachCode(
        *weight, [&](int64_t group) { lrq::tableOf(*weight, group, mantissas, table); },
        [&](int32_t code) { return table[code]; }, decoded);
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqDecodeByWords(LrqPackedWeight const* weight, int8_t* decoded) {
    lrq::Status const status = lrq::checkWeight(weight);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    if (decoded == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    switch (weight->bits) {
        case 4:
            lrq::decodeByWords<4>(*weight, decoded);
            break;
        case 3:
            lrq::decodeByWords<3>(*weight, decoded);
            break;
        case 2:
            lrq::decodeByWords<2>(*weight, decoded);
            break;
        default:  // INT8
            std::memcpy(decoded, weight->codes, static_cast<size_t>(weight->codesBytes));
    }
    return lrq::code(lrq::Status::kOk);
}

uint32_t lrqPermuteBytes(uint32_t low, uint32_t high, uint32_t selectors) {
    return lrq::permuteBytes(low, high, selectors);
}

int32_t lrqExpandTables(LrqPackedWeight const* weight, int8_t* tables) {
    lrq::Status const status = lrq::checkCodedWeight(weight);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    if (tables == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    lrq::Mantissas const mantissas = lrq::mantissasOf(*weight);
    int64_t const groups = weight->rows * lrq::groupsPerRow(*weight);
    for (int64_t group = 0; group < groups; ++group) {
        lrq::tableOf(*weight, group, mantissas, tables + (group << weight->bits));
    }
    return lrq::code(lrq::Status::kOk);
}
