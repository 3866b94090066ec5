// The product for sizes that tensor cores do not take: any number of tokens, rows and columns.
#pragma once

#include "product.h"

namespace lrq {

// False if CUDA refused the launch. `type` is an LrqType.
bool multiplyAnySize(Product const& product, int32_t type, cudaStream_t stream);

}  // namespace lrq
