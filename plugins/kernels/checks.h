// Every field of a call, checked on the host before CUDA is asked for anything. Each function
// returns 0 or the status of the first fault, whose text names the field, what it is and what is
// needed.
#pragma once

#include "kernels.h"

namespace lrq {

int32_t checkRotation(LrqRotation const* rotation);

// `output` is what the call writes, `name` what the interface calls it.
int32_t checkDecode(LrqWeight const* weight, void const* output, char const* name);

int32_t checkRowScales(float const* scales);

int32_t checkLinear(LrqLinear const* linear);

// checkLinear but for where pointers lie: what a size in bytes can depend on.
int32_t checkLinearSizes(LrqLinear const* linear);

int64_t countOf(LrqTokens const& tokens);

}  // namespace lrq
