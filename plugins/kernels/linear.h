// A checked lrqLinear: quantize, decode, multiply.
#pragma once

#include "kernels.h"
#include "plan.h"
#include "product.h"

namespace lrq {

WorkspacePlan planOf(LrqLinear const& linear);

// A weight as the kernels take it.
struct DecodeArguments;
DecodeArguments decodeArgumentsOf(LrqWeight const& weight, float const* scales, void* decoded);

// A checked rotation of at least one token.
int32_t runRotation(LrqRotation const& rotation, Device const& device, cudaStream_t stream);

// A checked decode.
int32_t runDecode(LrqWeight const& weight, int8_t* decoded, cudaStream_t stream);

// A checked product of at least one token with enough workspace.
int32_t runLinear(LrqLinear const& linear, Device const& device, uint8_t* workspace,
                  cudaStream_t stream);

}  // namespace lrq
