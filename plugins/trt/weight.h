// The weight of a node: its format, from the attributes, and its tensors, from the inputs.
#pragma once

#include "plugin_base.h"

namespace lrq::trt {

class Weight {
public:
    // Throws PluginError for attributes that do not go together.
    Weight(Attributes const& attributes, LrqFormat format);

    int64_t rows() const { return mStruct.rows; }
    int64_t cols() const { return mStruct.cols; }
    LrqFormat format() const { return static_cast<LrqFormat>(mStruct.format); }

    // Throws PluginError where the shapes of codes, exponents or table, and scale, which are inputs
    // of `op`, are not this weight's.
    void checkShapes(Shapes const& shapes, ops::Op const& op) const;

    // The weight with its tensors.
    LrqWeight at(void const* codes, void const* levels) const;

    // The input beside the codes that says what they mean; null for INT8, which has none.
    char const* levelsName() const;

private:
    LrqWeight mStruct{};  // no pointers
};

}  // namespace lrq::trt
