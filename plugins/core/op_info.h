// What an op of the dialect is to C++: its names, inputs and attributes. generated/ops.h holds one
// record an op, made from graphs/ops, so that nothing about an op is written twice.
#pragma once

#include <cstdint>

namespace lrq::ops {

// The element type of an input or output.
enum class Element : int32_t {
    kActivation,  // T: float, float16 or bfloat16, the same one wherever a node has it
    kFloat,
    kInt8,
    kCodes,  // INT4 for 4-bit codes as graphs/ops/packing.py stores them, else INT8
};

struct Tensor {
    char const* name;
    Element element;
};

enum class Kind : int32_t { kInteger, kReal, kText };

// Choices are all of the attribute's kind; none: every value is accepted.
struct Attribute {
    char const* name;
    Kind kind;
    bool required;
    int32_t integer;   // the default, of the attribute's kind
    char const* text;
    int32_t const* integerChoices;
    char const* const* textChoices;
    int32_t choiceCount;
};

struct Op {
    char const* name;
    Tensor const* inputs;
    int32_t inputCount;
    Tensor output;
    Attribute const* attributes;
    int32_t attributeCount;
};

constexpr bool sameText(char const* left, char const* right) {
    while (*left != '\0' && *left == *right) {
        ++left;
        ++right;
    }
    return *left == *right;
}

// The position of an input, -1 if the op has none of that name.
constexpr int32_t inputIndex(Op const& op, char const* name) {
    for (int32_t index = 0; index < op.inputCount; ++index) {
        if (sameText(op.inputs[index].name, name)) {
            return index;
        }
    }
    return -1;
}

constexpr int32_t attributeIndex(Op const& op, char const* name) {
    for (int32_t index = 0; index < op.attributeCount; ++index) {
        if (sameText(op.attributes[index].name, name)) {
            return index;
        }
    }
    return -1;
}

}  // namespace lrq::ops
