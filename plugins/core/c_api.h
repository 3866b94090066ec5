// The C interface of lrq_core: reference loops for parity tests and for CPU tools. Every function
// checks its arguments, returns an lrq::Status as int32 and writes its output only when that is 0.
// No exception leaves it, and no value of packed codes, exponents or activations is undefined.
#pragma once

#include <stdint.h>

#include "export.h"

#ifdef __cplusplus
extern "C" {
#endif

// A packed weight (rows, cols), as TwinLogDequant stores it. Byte counts must be exact.
typedef struct LrqPackedWeight {
    uint8_t const* codes;  // (rows, planes, elements), the tensor's raw data
    int64_t codesBytes;
    int8_t const* exponents;  // (rows, cols / groupSize, 2, 3)
    int64_t exponentsBytes;
    int64_t rows;
    int64_t cols;
    int64_t groupSize;
    int32_t bits;
    int32_t fractionBits;
    int32_t integerBits;
} LrqPackedWeight;

// y (tokens, rows) = (q w^T) * tokenScale * rowScale + bias
typedef struct LrqProduct {
    int8_t const* activations;  // q (tokens, cols)
    float const* tokenScales;   // (tokens,)
    int8_t const* weight;       // w (rows, cols)
    float const* rowScales;     // (rows,)
    float const* bias;          // (rows,)
    int64_t tokens;
    int64_t rows;
    int64_t cols;
} LrqProduct;

// What a returned status means, in a few words; never null.
LRQ_EXPORT char const* lrqStatusText(int32_t status);

// codes (rows, cols), one a byte. Reads no exponents.
LRQ_EXPORT int32_t lrqUnpackCodes(LrqPackedWeight const* weight, uint8_t* codes);

// w (rows, cols), each code decoded by shifts.
LRQ_EXPORT int32_t lrqDecodeByShifts(LrqPackedWeight const* weight, int8_t* decoded);

// w (rows, cols) through one table of 2^bits entries a group: the same numbers.
LRQ_EXPORT int32_t lrqDecodeByTable(LrqPackedWeight const* weight, int8_t* decoded);

// tables (rows, groups, 2^bits)
LRQ_EXPORT int32_t lrqExpandTables(LrqPackedWeight const* weight, int8_t* tables);

// x (tokens, cols) -> q (tokens, cols), scales (tokens,); actBits 8 or 6.
LRQ_EXPORT int32_t lrqQuantizeTokens(float const* x, int64_t tokens, int64_t cols, int32_t actBits,
                                     int8_t* quantized, float* scales);

// y (tokens, rows)
LRQ_EXPORT int32_t lrqTokenProduct(LrqProduct const* product, float* y);

#ifdef __cplusplus
}
#endif
