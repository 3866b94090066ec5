// One integer product on device memory, as every tactic of lrqLinear takes it: checked, decoded if
// the tactic does not decode, and in 32-bit sizes where tensor cores index with those.
//
//     y = ((q w^T) tokenScale rowScale + bias) gate + residual
#pragma once

#include <cstdint>

#include "../core/formats.h"

// As cuda_runtime_api.h has it, which the CPU twin of the kernels does without.
typedef struct CUstream_st* cudaStream_t;

namespace lrq {

// Rows of channels for tokens, at data + outer * outerStride + inner * innerStride elements.
struct TokenRows {
    void const* data;
    int64_t outerStride;
    int64_t innerStride;
    int32_t innerCount;  // token = outer * innerCount + inner

    // The row of a token, whose place is found in 32 bits if it is a number of 32.
    template <class T, class Token>
    LRQ_HOST_DEVICE T const* rowOf(Token token) const {
        int64_t const outer = token / innerCount;
        int64_t const inner = token % innerCount;
        return static_cast<T const*>(data) + outer * outerStride + inner * innerStride;
    }
};

struct Product {
    int8_t const* quantized;   // (tokens, cols)
    float const* tokenScales;  // (tokens,)
    int8_t const* weight;      // (rows, cols)
    float const* rowScales;    // (rows,)
    float const* bias;         // (rows,), or null
    TokenRows gate;            // of T; data is null without an epilogue
    void const* residual;      // T, rows `stride` apart; null without an epilogue
    void* y;                   // T, rows `stride` apart
    int32_t tokens;
    int32_t rows;
    int32_t cols;
    int64_t stride;  // elements between the tokens of y and residual: the rows of the whole weight
};

struct Device {
    int32_t architecture;  // 90 for compute capability 9.0
    int32_t processors;    // streaming multiprocessors
    int64_t sharedBytes;   // that one block can have
};

// Enqueues the product; false if CUTLASS or CUDA refused it.
using ProductLauncher = bool (*)(Product const&, Device const&, cudaStream_t);

}  // namespace lrq
