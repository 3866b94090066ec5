// One level of a weight that nobody checked: what a table holds for a code.
#pragma once

#include "../core/decode.h"
#include "decode_weight.h"
#include "device.h"

namespace lrq {

// What code `code` of a group stands for; groups are numbered row * groups of a row + group.
__device__ inline int32_t levelOf(DecodeArguments const& arguments, int64_t group, int32_t code) {
    if (arguments.format == Format::kCodebook) {
        return clampLevel(arguments.levels[(group << arguments.bits) + code]);
    }
    // decodeWeightClamped, without a copy of both sides that an index would force into memory.
    int32_t const side = code >> (arguments.bits - 1);
    int32_t const magnitude = code & ((1 << (arguments.bits - 1)) - 1);
    int8_t const* const field = arguments.levels + 6 * group + 3 * side;
    SideExponents const exponents{field[0], field[1], field[2]};
    int32_t const level =
        clampLevel(decodeLevel(exponents, magnitude, arguments.mantissas));
    return side != 0 ? -level : level;
}

}  // namespace lrq
