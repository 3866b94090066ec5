// Per-token quantization without a division for every element, with the codes of core/decode.h:
// q = clamp(round half to even(x / s)).
//
// With r = 1 / s correctly rounded, q0 = x r is off by at most a unit or two in the last place, and
// q1 = q0 + (x - q0 s) r, its remainder exact in a fused multiply-add, is x / s correctly rounded
// (Markstein, IA-64 and Elementary Functions, 2000, section 8). Adding 1.5 * 2^23 then rounds half
// to even and leaves the integer in the low bits. Nothing here can exceed the limit: s >= |x| /
// limit up to a rounding that no integer notices. That holds for finite x while neither s, r nor the remainder
// leaves the normal range; other tokens take the division.
#pragma once

#include <cstring>

#include "../core/decode.h"
#include "device.h"

namespace lrq {

constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: one unit in the last place is 1
constexpr float kSmallestFastScale = 0x1p-60f;
constexpr float kLargestFastScale = 0x1p60f;

struct TokenQuantizer {
    float scale;
    float reciprocal;
    int32_t limit;
    bool isFast;
};

__device__ inline TokenQuantizer makeQuantizer(float peak, int32_t limit) {
    float const scale = tokenScale(peak, limit);
    bool const isFast = scale > kSmallestFastScale && scale < kLargestFastScale;
    return {scale, 1.0f / scale, limit, isFast};
}

// The code in the low byte; the other bytes are anything. `kIsFast` is quantizer.isFast, which is
// the same for a whole token.
template <bool kIsFast>
__device__ inline uint32_t quantizeAs(float x, TokenQuantizer const& quantizer) {
    if constexpr (!kIsFast) {
        return static_cast<uint8_t>(quantizeActivation(x, quantizer.scale, quantizer.limit));
    }
    float const estimate = x * quantizer.reciprocal;
    float const remainder = multiplyAdd(-estimate, quantizer.scale, x);
    float const quotient = multiplyAdd(remainder, quantizer.reciprocal, estimate);
    return static_cast<uint32_t>(bitsOf(quotient + kRoundToInteger));
}

__device__ inline uint32_t quantize(float x, TokenQuantizer const& quantizer) {
    return quantizer.isFast ? quantizeAs<true>(x, quantizer) : quantizeAs<false>(x, quantizer);
}

}  // namespace lrq
