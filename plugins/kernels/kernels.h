// The C interface of liblrq_kernels: what the dialect's ops do, on device memory and a CUDA stream.
// The TensorRT plugins and torch.ops.lrq call it; there are no TensorRT and no torch types in it,
// so one binary serves both.
//
// Every function checks its arguments on the host before it asks CUDA for anything and returns a
// Status of core/formats.h, or one of LrqKernelsStatus, as int32; lrqKernelsError says for the last
// failure of this thread what was got and what is needed. All pointers but those to the structs
// themselves are device pointers; tensors of T, codes, scales and biases of rows begin at a
// multiple of 16 bytes, a workspace at one of 256, the rest at a multiple of its element. Work is
// enqueued on `stream`, a cudaStream_t; nothing synchronizes or allocates, so every call can be
// captured in a CUDA graph, and two streams never share memory that the caller did not share
// between them.
#pragma once

#include <stdint.h>

#include "../core/export.h"

#ifdef __cplusplus
extern "C" {
#endif

// What a call returns beside the Status of core/formats.h. The text says which field is at fault.
typedef enum LrqKernelsStatus {
    LRQ_MISALIGNED = 101,     // a pointer does not begin where vector loads need it
    LRQ_BAD_WORKSPACE = 102,  // smaller than lrqLinearWorkspace says
    LRQ_NOT_COMPILED = 103,   // the library has no kernel for this device, size or tactic
    LRQ_CUDA_ERROR = 104,     // CUDA refused a launch, or there is no device
} LrqKernelsStatus;

// The element type T of activations.
typedef enum LrqType { LRQ_FLOAT = 0, LRQ_HALF = 1, LRQ_BFLOAT16 = 2 } LrqType;

// What is computed from x before it is rotated; graphs/ops has one op for each.
typedef enum LrqPrologue {
    LRQ_NO_PROLOGUE = 0,  // HadamardRotate
    LRQ_LAYER_NORM = 1,   // LayerNormRotate
    LRQ_RMS_NORM = 2,     // RMSNormRotate
    LRQ_GELU = 3,         // GeluRotate
    LRQ_GELU_TANH = 4,    // GeluTanhRotate
    LRQ_SILU = 5,         // SiluRotate
    LRQ_GEGLU = 6,        // GegluRotate: x has 2 * channels
} LrqPrologue;

typedef enum LrqFormat { LRQ_TWIN_LOG = 0, LRQ_CODEBOOK = 1, LRQ_INT8 = 2 } LrqFormat;

// How codes lie: graphs/ops/packing.py or graphs/ops/words.py. INT8 weights have one layout,
// STORAGE.
typedef enum LrqCodesLayout { LRQ_STORAGE = 0, LRQ_WORDS = 1 } LrqCodesLayout;

// Tokens are numbered token = outer * innerCount + inner, as rows of (outer, inner, channels).
typedef struct LrqTokens {
    int64_t outerCount;
    int64_t innerCount;
} LrqTokens;

// One row of channels for every token, of T, at data + outer * outerStride + inner * innerStride
// elements: strides of 0 broadcast, so that (n,), (B, 1, n), (1, S, n) and (B, S, n) are all of
// this form.
typedef struct LrqModulation {
    void const* data;
    int64_t outerStride;
    int64_t innerStride;
} LrqModulation;

// y = prologue(x) diag(signs) H on blocks of channels, as T, or quantized per token.
typedef struct LrqRotation {
    void const* x;        // T (tokens, channels), finite; twice the channels for LRQ_GEGLU
    LrqModulation scale;  // of a norm; else data is null
    LrqModulation shift;
    void const* signs;    // T (channels,), or null: all 1
    void* y;              // actBits 0: T (tokens, channels); else INT8 codes of the same shape
    float* tokenScales;   // (tokens,), written with the codes; else null
    LrqTokens tokens;
    int64_t channels;
    int32_t block;        // channels that one H mixes; 1: signs alone
    int32_t prologue;     // LrqPrologue
    float epsilon;        // of a norm
    int32_t type;         // LrqType
    int32_t actBits;      // 8, 6 or 4; 0: y stays T
} LrqRotation;

LRQ_EXPORT int32_t lrqRotate(LrqRotation const* rotation, void* stream);

// A weight (rows, cols) of small integers w, as the inputs and attributes of its op give it.
typedef struct LrqWeight {
    void const* codes;     // as `layout` says; INT8 (rows, cols) for LRQ_INT8
    // Exponents (rows, groups, 2, 3) or table (rows, groups, 2^bits), groups = cols / groupSize;
    // else null.
    int8_t const* levels;
    int64_t rows;
    int64_t cols;
    int64_t groupSize;
    int32_t format;        // LrqFormat
    int32_t layout;        // LrqCodesLayout
    int32_t bits;          // 4, 3, 2; 8 for LRQ_INT8
    int32_t fractionBits;  // of LRQ_TWIN_LOG
    int32_t integerBits;
} LrqWeight;

// w (rows, cols) INT8. What is read from `levels` is never trusted: levels outside -127..127 are
// clamped into it.
LRQ_EXPORT int32_t lrqDecode(LrqWeight const* weight, int8_t* decoded, void* stream);

// W (rows, cols) float = scale[row] w.
LRQ_EXPORT int32_t lrqDequantize(
    LrqWeight const* weight, float const* scale, float* dequantized, void* stream);

// How a product is computed. LRQ_AUTO weighs the others; a builder may time them and ask for one.
typedef enum LrqTactic {
    LRQ_AUTO = 0,
    LRQ_ANY_SIZE = 1,        // one thread an output: for odd sizes
    LRQ_FEW_TOKENS = 2,      // up to 64 tokens, codes in words, decoded in registers
    // Tokens x rows of a tile on the tensor cores; for cols % 16 == 0 and whole 16-byte rows of y.
    LRQ_TILE_128_256 = 3,
    LRQ_TILE_128_128 = 4,
    LRQ_TILE_64_256 = 5,
    LRQ_TILE_64_192 = 6,
    LRQ_TILE_64_128 = 7,
    LRQ_TACTICS = 8,
} LrqTactic;

// y = ((q w^T) tokenScale rowScale + bias) gate + residual, q the codes of x per token. Gate and
// residual come together or not at all: both data are null then.
typedef struct LrqLinear {
    void const* x;               // T (tokens, cols), finite; null if it comes quantized
    int8_t const* quantized;     // (tokens, cols) as lrqRotate writes them; null if x is given
    float const* tokenScales;    // (tokens,), with `quantized`
    LrqWeight weight;
    // Residency int8: what lrqDecode wrote. Residency packed: null, and this call decodes.
    int8_t const* decoded;
    float const* rowScales;      // (rows,)
    float const* bias;           // (rows,), or null
    LrqModulation gate;          // T, rows of weight.rows channels
    void const* residual;        // T (tokens, rows)
    void* y;                     // T (tokens, rows)
    LrqTokens tokens;
    void const* signs;           // of a rotation of x; null: all 1
    int32_t block;               // of a rotation of x; 0 or 1: none
    int32_t type;                // LrqType
    int32_t actBits;             // 8, 6 or 4
    int32_t tactic;              // LrqTactic
} LrqLinear;

// Bytes of workspace that lrqLinear needs: of sizes alone, the same on every device, and growing
// with the tokens. Its pointers are not looked at but for which of them are null. -1 if it would
// refuse the call.
LRQ_EXPORT int64_t lrqLinearWorkspace(LrqLinear const* linear);

LRQ_EXPORT int32_t lrqLinear(
    LrqLinear const* linear, void* workspace, int64_t workspaceBytes, void* stream);

// What the last failed call of this thread got and needed; "" if none failed. Valid until the
// thread's next call.
LRQ_EXPORT char const* lrqKernelsError(void);

// sizeof LrqTokens, LrqModulation, LrqRotation, LrqWeight and LrqLinear, in this order, for callers
// of another language.
LRQ_EXPORT int32_t lrqKernelsStructSizes(int32_t* sizes, int32_t capacity);

// The compute capabilities (80, 86, ...) compiled in, in ascending order; returns how many there
// are.
LRQ_EXPORT int32_t lrqKernelsArchitectures(int32_t* architectures, int32_t capacity);

#ifdef __cplusplus
}
#endif
