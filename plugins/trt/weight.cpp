#include "weight.h"

#include "../core/decode.h"
#include "../core/words.h"

namespace lrq::trt {

Weight::Weight(Attributes const& attributes, LrqFormat format) {
    mStruct.format = format;
    mStruct.rows = attributes.integer("rows");
    mStruct.cols = attributes.integer("cols");
    mStruct.bits = attributes.integerOr("bits", 8);
    mStruct.groupSize = attributes.integerOr("group_size", attributes.integer("cols"));
    mStruct.fractionBits = attributes.integerOr("fraction_bits", 0);
    mStruct.integerBits = attributes.integerOr("integer_bits", 0);
    mStruct.layout = attributes.textOr("layout", "storage") == "words" ? LRQ_WORDS : LRQ_STORAGE;
    if (rows() < 1 || rows() > kMaxDimension || cols() < 1 || cols() > kMaxDimension) {
        throw PluginError("rows " + std::to_string(rows()) + " and cols " + std::to_string(cols()) +
                          ", needed 1.." + std::to_string(kMaxDimension));
    }
    if (mStruct.groupSize < 1 || cols() % mStruct.groupSize != 0) {
        throw PluginError("group_size " + std::to_string(mStruct.groupSize) +
                          " does not divide the " + std::to_string(cols()) + " columns");
    }
    if (format == LRQ_TWIN_LOG && !validMantissaBits(mStruct.fractionBits, mStruct.integerBits)) {
        throw PluginError("fraction_bits " + std::to_string(mStruct.fractionBits) +
                          " and integer_bits " + std::to_string(mStruct.integerBits) +
                          ", needed 0.." + std::to_string(kMaxFractionBits) + " and 0.." +
                          std::to_string(kMaxIntegerBits));
    }
}

char const* Weight::levelsName() const {
    switch (format()) {
        case LRQ_TWIN_LOG:
            return "exponents";
        case LRQ_CODEBOOK:
            return "table";
        case LRQ_INT8:
            return nullptr;
    }
    throw std::logic_error("a weight of unknown format");
}

void Weight::checkShapes(Shapes const& shapes, ops::Op const& op) const {
    auto const shape = [&](char const* name) -> Dims const& {
        return shapes[static_cast<size_t>(ops::inputIndex(op, name))];
    };
    int64_t const groups = cols() / mStruct.groupSize;
    int32_t const bits = mStruct.bits;
    if (format() == LRQ_INT8) {
        needShape("codes", shape("codes"), {rows(), cols()});
    } else if (mStruct.layout == LRQ_WORDS) {
        needShape("codes", shape("codes"), {rows(), wordsRowBytes(bits, cols())});
    } else {
        needShape("codes", shape("codes"),
                  {rows(), layoutOf(bits).planes, elementsPerRow(bits, cols())});
    }
    if (format() == LRQ_TWIN_LOG) {
        needShape("exponents", shape("exponents"), {rows(), groups, 2, 3});
    } else if (format() == LRQ_CODEBOOK) {
        needShape("table", shape("table"), {rows(), groups, int64_t{1} << bits});
    }
    needShape("scale", shape("scale"), {rows()});
}

LrqWeight Weight::at(void const* codes, void const* levels) const {
    LrqWeight weight = mStruct;
    weight.codes = codes;
    weight.levels = static_cast<int8_t const*>(levels);
    return weight;
}

}  // namespace lrq::trt
