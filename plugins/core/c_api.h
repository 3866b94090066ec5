// The C interface of lrq_core: reference loops for parity tests and for CPU tools. Every function
// with a pointer checks its arguments, returns an lrq::Status as int32 and writes its output only
// when that is 0. No exception leaves it, nothing is allocated, and no value of codes, levels or
// activations is undefined. Outputs overlap no input.
#pragma once

#include <stdint.h>

#include "export.h"

#ifdef __cplusplus
extern "C" {
#endif

// The integers w (rows, cols) of a weight, as the inputs and attributes of its op give them. Byte
// counts must be exact.
typedef struct LrqPackedWeight {
    void const* codes;  // the tensor's raw data
    int64_t codesBytes;
    // Exponents (rows, cols / groupSize, 2, 3) or table (rows, cols / groupSize, 2^bits); 0 bytes
    // for INT8.
    int8_t const* levels;
    int64_t levelsBytes;
    int64_t rows;
    int64_t cols;
    int64_t groupSize;
    int32_t format;  // lrq::Format
    int32_t layout;  // lrq::CodesLayout; storage for INT8
    int32_t bits;    // 4, 3, 2; 8 for INT8
    int32_t fractionBits;
    int32_t integerBits;
} LrqPackedWeight;

// y (tokens, channels) = prologue(x) diag(signs) H on blocks of channels
typedef struct LrqTokenRotation {
    float const* x;      // (tokens, channels); twice the channels for lrq::Prologue::kGeglu
    float const* scale;  // (tokens, channels) of a norm, as is shift; else not read
    float const* shift;
    float const* signs;  // (channels,)
    int64_t tokens;
    int64_t channels;
    int64_t block;     // channels that one H mixes
    int32_t prologue;  // lrq::Prologue
    float epsilon;     // of a norm
} LrqTokenRotation;

// y (tokens, rows) = ((q w^T) tokenScale rowScale + bias) gate + residual
typedef struct LrqProduct {
    int8_t const* activations;  // q (tokens, cols)
    float const* tokenScales;   // (tokens,)
    int8_t const* weight;       // w (rows, cols)
    float const* rowScales;     // (rows,)
    float const* bias;          // (rows,)
    float const* gate;          // (tokens, rows); null together with residual: neither
    float const* residual;      // (tokens, rows)
    int64_t tokens;
    int64_t rows;
    int64_t cols;
} LrqProduct;

// What a returned status means, in a few words; never null.
LRQ_EXPORT char const* lrqStatusText(int32_t status);

// codes (rows, cols), one a byte -> packed, in an lrq::CodesLayout; packedBytes must be exact. Of a
// code the low `bits` bits are read.
LRQ_EXPORT int32_t lrqPackCodes(uint8_t const* codes, int64_t rows, int64_t cols, int32_t bits,
                                int32_t layout, uint8_t* packed, int64_t packedBytes);

// codes (rows, cols), one a byte. Reads no levels; not for INT8.
LRQ_EXPORT int32_t lrqUnpackCodes(LrqPackedWeight const* weight, uint8_t* codes);

// w (rows, cols), each code decoded by shifts; Twin-Log only.
LRQ_EXPORT int32_t lrqDecodeByShifts(LrqPackedWeight const* weight, int8_t* decoded);

// w (rows, cols) through one table of 2^bits entries a group: the same numbers. Not for INT8.
LRQ_EXPORT int32_t lrqDecodeByTable(LrqPackedWeight const* weight, int8_t* decoded);

// w (rows, cols) as the GPU kernels decode it: a word at a time through tables in registers. The
// same numbers for valid levels; levels are not checked, but clamped into -127..127.
LRQ_EXPORT int32_t lrqDecodeByWords(LrqPackedWeight const* weight, int8_t* decoded);

// A GPU's PRMT instruction, as the functions here compute it: permuteBytes of table_decode.h.
LRQ_EXPORT uint32_t lrqPermuteBytes(uint32_t low, uint32_t high, uint32_t selectors);

// tables (rows, groups, 2^bits). Not for INT8.
LRQ_EXPORT int32_t lrqExpandTables(LrqPackedWeight const* weight, int8_t* tables);

// matrix (base, base) of +-1, the Paley factor of `block`; matrixEntries = base^2 must be exact.
// `base` and `order` as lrqHadamardFactors gives them.
LRQ_EXPORT int32_t lrqHadamardMatrix(int32_t base, int32_t order, int8_t* matrix,
                                     int64_t matrixEntries);

// factors (3,): block = base * power, and the prime `order` behind base: [base, order, power].
LRQ_EXPORT int32_t lrqHadamardFactors(int64_t block, int32_t* factors);

// y (tokens, channels)
LRQ_EXPORT int32_t lrqRotateTokens(LrqTokenRotation const* rotation, float* y);

// x (tokens, cols) -> q (tokens, cols), scales (tokens,); actBits 8, 6 or 4.
LRQ_EXPORT int32_t lrqQuantizeTokens(float const* x, int64_t tokens, int64_t cols, int32_t actBits,
                                     int8_t* quantized, float* scales);

// y (tokens, rows)
LRQ_EXPORT int32_t lrqTokenProduct(LrqProduct const* product, float* y);

#ifdef __cplusplus
}
#endif
