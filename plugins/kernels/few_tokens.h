// The product for up to 64 tokens: as fast as the packed weights can be read.
#pragma once

#include "decode_weight.h"
#include "product.h"

namespace lrq {

constexpr int32_t kMostFewTokens = 64;

// Whether the kernel takes this weight: codes in words whose rows are whole 16-byte loads of a
// lane, groups that a load does not straddle, tables that fit in shared memory.
bool fewTokensFit(DecodeArguments const& weight, int64_t tokens);

// `product.weight` is not read. False if CUDA refused the launch. `type` is an LrqType.
bool multiplyFewTokens(Product const& product, DecodeArguments const& weight, int32_t type,
                       cudaStream_t stream);

}  // namespace lrq
