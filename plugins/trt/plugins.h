// The kinds of plugins: a function that makes one of each. registry.cpp says which op is of which.
#pragma once

#include <memory>

#include "plugin_base.h"

namespace lrq::trt {

// Each throws PluginError for attributes that do not go together.
std::unique_ptr<Plugin> makeRotate(ops::Op const& op, Attributes attributes, LrqPrologue prologue);
std::unique_ptr<Plugin> makeDequant(ops::Op const& op, Attributes attributes, LrqFormat format);
std::unique_ptr<Plugin> makeLinear(ops::Op const& op, Attributes attributes, LrqFormat format);

// All creators, as getCreators exports them.
nvinfer1::IPluginCreatorInterface* const* creators(int32_t& count);

}  // namespace lrq::trt
