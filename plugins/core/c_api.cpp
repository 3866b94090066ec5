#include "c_api.h"

#include "decode.h"

namespace lrq {
namespace {

int32_t code(Status status) {
    return static_cast<int32_t>(status);
}

bool inRange(int64_t dimension) {
    return dimension > 0 && dimension <= kMaxDimension;
}

Status checkCodes(LrqPackedWeight const* weight) {
    if (weight == nullptr || weight->codes == nullptr) {
        return Status::kNullPointer;
    }
    if (!hasLayout(weight->bits)) {
        return Status::kBadBits;
    }
    if (!inRange(weight->rows) || !inRange(weight->cols) ||
        weight->codesBytes != packedBytes(weight->bits, weight->rows, weight->cols)) {
        return Status::kBadSize;
    }
    return Status::kOk;
}

GroupExponents groupAt(LrqPackedWeight const& weight, int64_t index) {
    int8_t const* field = weight.exponents + index * static_cast<int64_t>(sizeof(GroupExponents));
    return {{{field[0], field[1], field[2]}, {field[3], field[4], field[5]}}};
}

Status checkAllExponents(LrqPackedWeight const& weight, int64_t groups) {
    Mantissas const mantissas = makeMantissas(weight.fractionBits, weight.integerBits);
    for (int64_t index = 0; index < groups; ++index) {
        if (!checkExponents(groupAt(weight, index), weight.bits, mantissas)) {
            return Status::kBadExponents;
        }
    }
    return Status::kOk;
}

Status checkWeight(LrqPackedWeight const* weight) {
    Status const codes = checkCodes(weight);
    if (codes != Status::kOk) {
        return codes;
    }
    if (weight->exponents == nullptr) {
        return Status::kNullPointer;
    }
    if (!validMantissaBits(weight->fractionBits, weight->integerBits)) {
        return Status::kBadBits;
    }
    if (weight->groupSize <= 0 || weight->cols % weight->groupSize != 0) {
        return Status::kBadGroup;
    }
    int64_t const groups = weight->rows * (weight->cols / weight->groupSize);
    if (weight->exponentsBytes != groups * static_cast<int64_t>(sizeof(GroupExponents))) {
        return Status::kBadSize;
    }
    return checkAllExponents(*weight, groups);
}

// decoded (rows, cols) = decode(code) for every code of a checked weight, in row-major order;
// startGroup(exponents) comes before the first code of each group.
template <class StartGroup, class Decode>
void forEachCode(
    LrqPackedWeight const& weight, StartGroup startGroup, Decode decode, int8_t* decoded) {
    int64_t const groups = weight.cols / weight.groupSize;
    for (int64_t row = 0; row < weight.rows; ++row) {
        for (int64_t col = 0; col < weight.cols; ++col) {
            if (col % weight.groupSize == 0) {
                startGroup(groupAt(weight, row * groups + col / weight.groupSize));
            }
            decoded[row * weight.cols + col] =
                decode(readCode(weight.codes, weight.bits, weight.cols, row, col));
        }
    }
}

void quantizeToken(float const* x, int64_t cols, int32_t limit, int8_t* quantized, float* scale) {
    float peak = 0.0f;
    for (int64_t col = 0; col < cols; ++col) {
        peak = fmaxf(peak, fabsf(x[col]));
    }
    *scale = tokenScale(peak, limit);
    for (int64_t col = 0; col < cols; ++col) {
        quantized[col] = quantizeActivation(x[col], *scale, limit);
    }
}

int32_t dot(int8_t const* left, int8_t const* right, int64_t count) {
    int32_t sum = 0;
    for (int64_t index = 0; index < count; ++index) {
        sum += static_cast<int32_t>(left[index]) * static_cast<int32_t>(right[index]);
    }
    return sum;
}

}  // namespace
}  // namespace lrq

char const* lrqStatusText(int32_t status) {
    switch (static_cast<lrq::Status>(status)) {
        case lrq::Status::kOk:
            return "ok";
        case lrq::Status::kNullPointer:
            return "a required pointer is null";
        case lrq::Status::kBadBits:
            return "bits, fraction_bits, integer_bits or act_bits is out of range";
        case lrq::Status::kBadSize:
            return "a dimension is out of range or a buffer has the wrong size";
        case lrq::Status::kBadGroup:
            return "group_size does not divide the columns";
        case lrq::Status::kBadExponents:
            return "a step is negative or a level is outside 0..127";
    }
    return "unknown status";
}

int32_t lrqUnpackCodes(LrqPackedWeight const* weight, uint8_t* codes) {
    lrq::Status const status = lrq::checkCodes(weight);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    if (codes == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    for (int64_t row = 0; row < weight->rows; ++row) {
        for (int64_t col = 0; col < weight->cols; ++col) {
            codes[row * weight->cols + col] = static_cast<uint8_t>(
                lrq::readCode(weight->codes, weight->bits, weight->cols, row, col));
        }
    }
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqDecodeByShifts(LrqPackedWeight const* weight, int8_t* decoded) {
    lrq::Status const status = lrq::checkWeight(weight);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    if (decoded == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    lrq::Mantissas const mantissas = lrq::makeMantissas(weight->fractionBits, weight->integerBits);
    lrq::GroupExponents group{};
    lrq::forEachCode(
        *weight, [&](lrq::GroupExponents const& next) { group = next; },
        [&](int32_t code) { return lrq::decodeWeight(group, code, weight->bits, mantissas); },
        decoded);
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqDecodeByTable(LrqPackedWeight const* weight, int8_t* decoded) {
    lrq::Status const status = lrq::checkWeight(weight);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    if (decoded == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    lrq::Mantissas const mantissas = lrq::makeMantissas(weight->fractionBits, weight->integerBits);
    int8_t table[lrq::kMaxTableSize];
    lrq::forEachCode(
        *weight,
        [&](lrq::GroupExponents const& next) {
            lrq::expandTable(next, weight->bits, mantissas, table);
        },
        [&](int32_t code) { return table[code]; }, decoded);
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqExpandTables(LrqPackedWeight const* weight, int8_t* tables) {
    lrq::Status const status = lrq::checkWeight(weight);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    if (tables == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    lrq::Mantissas const mantissas = lrq::makeMantissas(weight->fractionBits, weight->integerBits);
    int64_t const groups = weight->rows * (weight->cols / weight->groupSize);
    for (int64_t index = 0; index < groups; ++index) {
        int8_t* const table = tables + (index << weight->bits);
        lrq::expandTable(lrq::groupAt(*weight, index), weight->bits, mantissas, table);
    }
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqQuantizeTokens(float const* x, int64_t tokens, int64_t cols, int32_t actBits,
                          int8_t* quantized, float* scales) {
    if (x == nullptr || quantized == nullptr || scales == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    if (actBits != 8 && actBits != 6 && actBits != 4) {
        return lrq::code(lrq::Status::kBadBits);
    }
    if (!lrq::inRange(tokens) || !lrq::inRange(cols)) {
        return lrq::code(lrq::Status::kBadSize);
    }
    int32_t const limit = lrq::activationLimit(actBits);
    for (int64_t token = 0; token < tokens; ++token) {
        int64_t const start = token * cols;
        lrq::quantizeToken(x + start, cols, limit, quantized + start, scales + token);
    }
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqTokenProduct(LrqProduct const* product, float* y) {
    if (product == nullptr || y == nullptr || product->activations == nullptr ||
        product->tokenScales == nullptr || product->weight == nullptr ||
        product->rowScales == nullptr || product->bias == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    int64_t const rows = product->rows;
    int64_t const cols = product->cols;
    if (!lrq::inRange(product->tokens) || !lrq::inRange(rows) || cols <= 0 ||
        cols > lrq::kMaxProductCols) {
        return lrq::code(lrq::Status::kBadSize);
    }
    for (int64_t token = 0; token < product->tokens; ++token) {
        for (int64_t row = 0; row < rows; ++row) {
            int32_t const sum =
                lrq::dot(product->activations + token * cols, product->weight + row * cols, cols);
            y[token * rows + row] = lrq::dequantizeSum(
                sum, product->tokenScales[token], product->rowScales[row], product->bias[row]);
        }
    }
    return lrq::code(lrq::Status::kOk);
}
