// y = prologue(x) diag(signs) H on blocks of channels, as T or quantized per token: what lrqRotate
// checks and this launches.
#pragma once

#include "../core/hadamard.h"
#include "product.h"

namespace lrq {

struct RotateArguments {
    void const* x;      // T (tokens, channels), twice the channels for GEGLU
    TokenRows scale;    // T, of a norm
    TokenRows shift;    // T, of a norm
    void const* signs;  // T (channels,), or null
    void* y;            // T, or INT8 codes
    float* tokenScales;
    int64_t tokens;
    int32_t channels;
    int32_t block;
    int32_t prologue;  // lrq::Prologue
    int32_t limit;     // of a code; 0: y stays T
    float epsilon;
    float root;  // 1 / sqrt(block)
};

// Shared memory of a rotation that is not in registers, but for what its kernel has of its own: one
// float a channel of the block, then H_K: bit `from` of mask `to` says that its entry is -1.
constexpr int32_t kMaskWords = kMaxHadamardBase / 32;

inline int64_t rotateSharedBytes(int32_t block, int32_t base) {
    return 4 * static_cast<int64_t>(block) + 4 * static_cast<int64_t>(base) * kMaskWords;
}

// Each false if CUDA refused the launch.
bool rotateFloat(RotateArguments const& arguments, cudaStream_t stream);
bool rotateHalf(RotateArguments const& arguments, cudaStream_t stream);
bool rotateBfloat16(RotateArguments const& arguments, cudaStream_t stream);

}  // namespace lrq
