// What becomes of a sum of INT8 products: y = ((sum tokenScale) rowScale + bias) gate + residual,
// in float, each step rounded (the kernels are compiled without contraction), then rounded once to
// T.
#pragma once

#include "../core/decode.h"
#include "device.h"
#include "product.h"

namespace lrq {

template <class T>
__device__ inline void storeSum(Product const& product, int32_t sum, int64_t token, int64_t row) {
    float const bias = product.bias == nullptr ? 0.0f : product.bias[row];
    float value = dequantizeSum(sum, product.tokenScales[token], product.rowScales[row], bias);
    int64_t const index = token * product.stride + row;
    if (product.residual != nullptr) {
        T const* const residual = static_cast<T const*>(product.residual);
        float const gate = toFloat(product.gate.rowOf<T>(token)[row]);
        value = addGated(value, gate, toFloat(residual[index]));
    }
    static_cast<T*>(product.y)[index] = fromFloat<T>(value);
}

}  // namespace lrq
