// Quantized tokens and their integer products: graphs/ops/token_product.py, gated_residual.py.
#include "c_api.h"
#include "c_api_checks.h"
#include "decode.h"

namespace lrq {
namespace {

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

bool isComplete(LrqProduct const& product) {
    return product.activations != nullptr && product.tokenScales != nullptr &&
           product.weight != nullptr && product.rowScales != nullptr && product.bias != nullptr &&
           (product.gate == nullptr) == (product.residual == nullptr);
}

}  // namespace
}  // namespace lrq

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
    if (product == nullptr || y == nullptr || !lrq::isComplete(*product)) {
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
            int64_t const at = token * rows + row;
            float const linear = lrq::dequantizeSum(
                sum, product->tokenScales[token], product->rowScales[row], product->bias[row]);
            y[at] = product->gate == nullptr
                        ? linear
                        : lrq::addGated(linear, product->gate[at], product->residual[at]);
        }
    }
    return lrq::code(lrq::Status::kOk);
}
