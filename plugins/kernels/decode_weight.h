// Codes to INT8, or to float times the scale of their row: what lrqDecode and lrqDequantize check
// and this launches.
#pragma once

#include "../core/decode.h"
#include "../core/words.h"
#include "product.h"

namespace lrq {

struct DecodeArguments {
    uint8_t const* codes;
    int8_t const* levels;    // exponents, or a table; of codes of LRQ_INT8 null
    float const* rowScales;  // (rows,), for float only
    void* decoded;           // INT8 or float (rows, cols)
    int64_t rows;
    int64_t cols;
    int64_t groupSize;
    Format format;
    CodesLayout layout;
    int32_t bits;
    Mantissas mantissas;
};

// Rows [first, first + count) of a weight, as a weight of its own. Where rows of codes do not begin
// at a byte, as those of an odd number of 4-bit codes do not, `first` must be even.
DecodeArguments rowsOf(DecodeArguments const& weight, int64_t first, int64_t count);

// Each false if CUDA refused the launch.
bool decodeToInt8(DecodeArguments const& arguments, cudaStream_t stream);
bool decodeToFloat(DecodeArguments const& arguments, cudaStream_t stream);

}  // namespace lrq
