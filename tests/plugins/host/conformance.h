// A plugin walked through its life as TensorRT would: made from the fields of a node, asked for
// types, shapes and formats, configured, serialized, made anew, attached to execution contexts and
// run on golden vectors.
#pragma once

#include <map>
#include <stdexcept>
#include <string>

#include "cases.h"
#include "fake_tensorrt.h"

// What a plugin does that it must not do.
class Failure : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Timings that TensorRT would keep under each id, and of what.
using TimingIds = std::map<std::string, std::string>;

// Throws Failure with the first thing that is wrong.
void walk(nvinfer1::IPluginCreatorV3One& creator, Case const& given, Logger& logger,
          TimingIds& timings);
