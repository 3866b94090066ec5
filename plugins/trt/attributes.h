// The attributes of one node: read from TensorRT's plugin fields, checked against the op, written
// back to be serialized.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/op_info.h"
#include "NvInfer.h"

namespace lrq::trt {

class Attributes {
public:
    // Fields as TensorRT's ONNX parser makes them (INT: kINT32, FLOAT: kFLOAT32, STRING: kCHAR with
    // its NUL), or as `serialized` gave them: in that case all of them are there, and no default
    // stands in for one that got lost. Throws PluginError for a field that is unknown, there twice,
    // missing, of another type, or out of its choices.
    Attributes(ops::Op const& op, nvinfer1::PluginFieldCollection const* fields, bool allRequired);

    // Of an attribute that the op has.
    int32_t integer(char const* name) const;
    float real(char const* name) const;
    std::string const& text(char const* name) const;

    // The integer or text, or a fallback where the op has no such attribute.
    int32_t integerOr(char const* name, int32_t fallback) const;
    std::string textOr(char const* name, char const* fallback) const;

    // Every attribute. The fields point into this object.
    std::vector<nvinfer1::PluginField> serialized() const;

    // "bits=4 group_size=1152 ...": the same for the same attributes, whatever the shapes.
    std::string description() const;

private:
    struct Value {
        int32_t integer;
        float real;
        std::string text;
    };

    Value const& value(char const* name, ops::Kind kind) const;
    void read(int32_t index, nvinfer1::PluginField const& field);
    void checkChoices(int32_t index) const;

    ops::Op const* mOp;
    std::vector<Value> mValues;  // in the order of the op's attributes
};

// The fields that an op's creator lists: the parser passes on the attributes of these names, and
// drops all others.
std::vector<nvinfer1::PluginField> listedFields(ops::Op const& op);

}  // namespace lrq::trt
