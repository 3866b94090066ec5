#include "checks.h"

#include <cinttypes>
#include <cmath>

#include "../core/activations.h"
#include "../core/decode.h"
#include "../core/hadamard.h"
#include "../core/words.h"
#include "failure.h"

namespace lrq {
namespace {

constexpr int64_t kVectorAlignment = 16;
constexpr int64_t kMostTokens = INT32_MAX;

int32_t statusOf(Status status) {
    return static_cast<int32_t>(status);
}

int32_t checkPointer(char const* name, void const* pointer, int64_t alignment) {
    if (pointer == nullptr) {
        return fail(statusOf(Status::kNullPointer), "%s is null, needed device memory", name);
    }
    if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) != 0) {
        return fail(LRQ_MISALIGNED,
                    "%s is %p, needed a multiple of %" PRId64 " bytes; copy a slice that begins "
                    "elsewhere into a tensor of its own",
                    name, pointer, alignment);
    }
    return 0;
}

int32_t checkOptional(char const* name, void const* pointer, int64_t alignment) {
    return pointer == nullptr ? 0 : checkPointer(name, pointer, alignment);
}

int32_t checkRange(char const* name, int64_t value, int64_t least, int64_t most, int32_t status) {
    if (value < least || value > most) {
        return fail(status, "%s is %" PRId64 ", needed %" PRId64 "..%" PRId64, name, value, least,
                    most);
    }
    return 0;
}

int32_t checkDimension(char const* name, int64_t value) {
    return checkRange(name, value, 1, kMaxDimension, statusOf(Status::kBadSize));
}

int32_t checkActBits(int32_t actBits, bool mayBeNone) {
    if (actBits == 8 || actBits == 6 || actBits == 4 || (mayBeNone && actBits == 0)) {
        return 0;
    }
    return fail(statusOf(Status::kBadBits), "actBits is %" PRId32 ", needed 8, 6%s", actBits,
                mayBeNone ? ", 4 or, to keep the type of x, 0" : " or 4");
}

int32_t checkTokens(LrqTokens const& tokens) {
    int32_t const status = statusOf(Status::kBadSize);
    if (int32_t const fault =
            checkRange("tokens.outerCount", tokens.outerCount, 0, kMostTokens, status)) {
        return fault;
    }
    if (int32_t const fault =
            checkRange("tokens.innerCount", tokens.innerCount, 0, kMostTokens, status)) {
        return fault;
    }
    return checkRange("tokens.outerCount * innerCount", tokens.outerCount * tokens.innerCount, 0,
                      kMostTokens, status);
}

// A value of an enum whose first is 0.
int32_t checkEnum(char const* name, int32_t value, int32_t last) {
    return checkRange(name, value, 0, last, statusOf(Status::kBadFormat));
}

int32_t checkType(int32_t type) {
    return checkEnum("type", type, LRQ_BFLOAT16);
}

int64_t bytesOf(int32_t type) {
    return type == LRQ_FLOAT ? 4 : 2;
}

int32_t checkModulation(char const* name, LrqModulation const& rows, int32_t type) {
    if (int32_t const fault = checkPointer(name, rows.data, bytesOf(type))) {
        return fault;
    }
    if (rows.outerStride < 0 || rows.innerStride < 0) {
        return fail(statusOf(Status::kBadSize),
                    "%s: strides %" PRId64 " and %" PRId64 ", needed 0 or more", name,
                    rows.outerStride, rows.innerStride);
    }
    return 0;
}

int32_t checkBlock(int64_t block, int64_t channels) {
    HadamardFactors factors{};
    if (!factorizeHadamard(block, &factors)) {
        return fail(statusOf(Status::kBadBlock),
                    "block is %" PRId64 ", which has no Hadamard matrix here: needed 2^m, or 2^m "
                    "times a Paley size up to 256, at most 65536",
                    block);
    }
    if (channels % block != 0) {
        return fail(statusOf(Status::kBadBlock),
                    "block %" PRId64 " does not divide the %" PRId64 " channels", block, channels);
    }
    return 0;
}

int32_t checkNorm(LrqRotation const& rotation) {
    if (!isNorm(static_cast<Prologue>(rotation.prologue))) {
        if (rotation.scale.data != nullptr || rotation.shift.data != nullptr) {
            return fail(statusOf(Status::kBadFormat),
                        "scale or shift is given, but prologue %" PRId32 " is not a norm",
                        rotation.prologue);
        }
        return 0;
    }
    if (!std::isfinite(rotation.epsilon) || rotation.epsilon < 0.0f) {
        return fail(statusOf(Status::kBadValue), "epsilon is %g, needed a finite number from 0 on",
                    static_cast<double>(rotation.epsilon));
    }
    if (int32_t const fault = checkModulation("scale", rotation.scale, rotation.type)) {
        return fault;
    }
    return checkModulation("shift", rotation.shift, rotation.type);
}

int32_t checkRotationSizes(LrqRotation const& rotation) {
    if (int32_t const fault = checkType(rotation.type)) {
        return fault;
    }
    if (int32_t const fault = checkEnum("prologue", rotation.prologue, LRQ_GEGLU)) {
        return fault;
    }
    if (int32_t const fault = checkActBits(rotation.actBits, true)) {
        return fault;
    }
    if (int32_t const fault = checkTokens(rotation.tokens)) {
        return fault;
    }
    if (int32_t const fault = checkDimension("channels", rotation.channels)) {
        return fault;
    }
    return checkBlock(rotation.block, rotation.channels);
}

int32_t checkCodeBits(LrqWeight const& weight) {
    if (weight.format == LRQ_INT8) {
        if (weight.bits != 8 || weight.layout != LRQ_STORAGE) {
            return fail(statusOf(Status::kBadBits),
                        "an INT8 weight has bits %" PRId32 " and layout %" PRId32
                        ", needed 8 and LRQ_STORAGE",
                        weight.bits, weight.layout);
        }
        return 0;
    }
    if (!hasLayout(weight.bits)) {
        return fail(statusOf(Status::kBadBits), "bits is %" PRId32 ", needed 4, 3 or 2",
                    weight.bits);
    }
    if (weight.groupSize < 1 || weight.cols % weight.groupSize != 0) {
        return fail(statusOf(Status::kBadGroup),
                    "groupSize %" PRId64 " does not divide the %" PRId64 " columns",
                    weight.groupSize, weight.cols);
    }
    bool const isTwinLog = weight.format == LRQ_TWIN_LOG;
    if (isTwinLog && !validMantissaBits(weight.fractionBits, weight.integerBits)) {
        return fail(statusOf(Status::kBadBits),
                    "fractionBits %" PRId32 " and integerBits %" PRId32
                    ", needed 0..%" PRId32 " and 0..%" PRId32,
                    weight.fractionBits, weight.integerBits, kMaxFractionBits, kMaxIntegerBits);
    }
    return 0;
}

int32_t checkWeightSizes(LrqWeight const& weight) {
    if (int32_t const fault = checkDimension("rows", weight.rows)) {
        return fault;
    }
    if (int32_t const fault = checkDimension("cols", weight.cols)) {
        return fault;
    }
    if (int32_t const fault = checkEnum("format", weight.format, LRQ_INT8)) {
        return fault;
    }
    if (int32_t const fault = checkEnum("layout", weight.layout, LRQ_WORDS)) {
        return fault;
    }
    return checkCodeBits(weight);
}

int32_t checkWeightPointers(LrqWeight const& weight) {
    if (int32_t const fault = checkPointer("codes", weight.codes, kVectorAlignment)) {
        return fault;
    }
    return weight.format == LRQ_INT8 ? 0 : checkPointer("levels", weight.levels, 1);
}

int32_t checkActivationPointers(LrqLinear const& linear) {
    if (linear.x != nullptr) {
        if (int32_t const fault = checkPointer("x", linear.x, kVectorAlignment)) {
            return fault;
        }
        return checkOptional("signs", linear.signs, kVectorAlignment);
    }
    if (int32_t const fault = checkPointer("quantized", linear.quantized, kVectorAlignment)) {
        return fault;
    }
    return checkPointer("tokenScales", linear.tokenScales, sizeof(float));
}

int32_t checkEpilogue(LrqLinear const& linear) {
    if ((linear.gate.data == nullptr) != (linear.residual == nullptr)) {
        return fail(statusOf(Status::kNullPointer),
                    "%s is null, needed both gate and residual or neither",
                    linear.residual == nullptr ? "residual" : "gate");
    }
    if (linear.residual == nullptr) {
        return 0;
    }
    if (int32_t const fault = checkModulation("gate", linear.gate, linear.type)) {
        return fault;
    }
    return checkPointer("residual", linear.residual, kVectorAlignment);
}

int32_t checkSource(LrqLinear const& linear) {
    if ((linear.x == nullptr) == (linear.quantized == nullptr)) {
        return fail(statusOf(Status::kNullPointer), "x and quantized are both %s, needed one",
                    linear.x == nullptr ? "null" : "given");
    }
    if (linear.x == nullptr && linear.block > 1) {
        return fail(statusOf(Status::kBadBlock),
                    "block is %" PRId32 ", but activations come quantized: rotate them before",
                    linear.block);
    }
    return linear.block > 1 ? checkBlock(linear.block, linear.weight.cols)
                            : checkRange("block", linear.block, 0, kMaxHadamardBlock,
                                         statusOf(Status::kBadBlock));
}

}  // namespace

int64_t countOf(LrqTokens const& tokens) {
    return tokens.outerCount * tokens.innerCount;
}

int32_t checkRotation(LrqRotation const* rotation) {
    if (rotation == nullptr) {
        return fail(statusOf(Status::kNullPointer), "rotation is null");
    }
    if (int32_t const fault = checkRotationSizes(*rotation)) {
        return fault;
    }
    if (countOf(rotation->tokens) == 0) {
        return 0;  // tensors without elements may lie anywhere
    }
    if (int32_t const fault = checkPointer("x", rotation->x, kVectorAlignment)) {
        return fault;
    }
    if (int32_t const fault = checkPointer("y", rotation->y, kVectorAlignment)) {
        return fault;
    }
    if (int32_t const fault = checkOptional("signs", rotation->signs, kVectorAlignment)) {
        return fault;
    }
    if (rotation->actBits != 0) {
        if (int32_t const fault =
                checkPointer("tokenScales", rotation->tokenScales, sizeof(float))) {
            return fault;
        }
    }
    return checkNorm(*rotation);
}

int32_t checkDecode(LrqWeight const* weight, void const* output, char const* name) {
    if (weight == nullptr) {
        return fail(statusOf(Status::kNullPointer), "weight is null");
    }
    if (int32_t const fault = checkWeightSizes(*weight)) {
        return fault;
    }
    if (int32_t const fault = checkWeightPointers(*weight)) {
        return fault;
    }
    return checkPointer(name, output, kVectorAlignment);
}

int32_t checkRowScales(float const* scales) {
    return checkPointer("scale", scales, sizeof(float));
}

int32_t checkLinearSizes(LrqLinear const* linear) {
    if (linear == nullptr) {
        return fail(statusOf(Status::kNullPointer), "linear is null");
    }
    if (int32_t const fault = checkType(linear->type)) {
        return fault;
    }
    if (int32_t const fault = checkActBits(linear->actBits, false)) {
        return fault;
    }
    if (int32_t const fault = checkTokens(linear->tokens)) {
        return fault;
    }
    if (int32_t const fault = checkWeightSizes(linear->weight)) {
        return fault;
    }
    if (int32_t const fault = checkRange("cols of a product", linear->weight.cols, 1,
                                         kMaxProductCols, statusOf(Status::kBadSize))) {
        return fault;
    }
    if (int32_t const fault = checkEnum("tactic", linear->tactic, LRQ_TACTICS - 1)) {
        return fault;
    }
    return checkSource(*linear);
}

int32_t checkLinear(LrqLinear const* linear) {
    if (int32_t const fault = checkLinearSizes(linear)) {
        return fault;
    }
    if (countOf(linear->tokens) == 0) {
        return 0;
    }
    if (int32_t const fault = checkActivationPointers(*linear)) {
        return fault;
    }
    // LRQ_AUTO may decode by itself although the weight is decoded already.
    if (linear->decoded == nullptr || linear->weight.codes != nullptr) {
        if (int32_t const fault = checkWeightPointers(linear->weight)) {
            return fault;
        }
    }
    if (int32_t const fault = checkOptional("decoded", linear->decoded, kVectorAlignment)) {
        return fault;
    }
    if (int32_t const fault = checkPointer("rowScales", linear->rowScales, kVectorAlignment)) {
        return fault;
    }
    if (int32_t const fault = checkOptional("bias", linear->bias, kVectorAlignment)) {
        return fault;
    }
    if (int32_t const fault = checkPointer("y", linear->y, kVectorAlignment)) {
        return fault;
    }
    return checkEpilogue(*linear);
}

}  // namespace lrq
