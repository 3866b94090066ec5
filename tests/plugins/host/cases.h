// Golden vectors: nodes with attributes and inputs, and the output of their numpy reference, as
// tests/plugins/golden.py writes them.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "NvInfer.h"

struct Tensor {
    std::string name;
    nvinfer1::DataType type;
    nvinfer1::Dims dims;
    std::vector<uint8_t> bytes;
};

// As ONNX holds it. TensorRT's parser makes the first kINT32, the second kFLOAT32, the third kCHAR.
struct Attribute {
    std::string name;
    std::variant<int32_t, float, std::string> value;
};

struct Case {
    std::string label;
    std::string op;
    std::vector<Attribute> attributes;
    std::vector<Tensor> inputs;
    Tensor output;
    double nmse;  // that the plugin may be off by
};

// Throws std::runtime_error for a file that is not what golden.py writes.
std::vector<Case> readCases(std::string const& path);
