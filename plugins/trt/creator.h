// IPluginCreatorV3One for any op: a table row of registry.cpp.
#pragma once

#include <functional>
#include <vector>

#include "plugins.h"

namespace lrq::trt {

using Maker = std::function<std::unique_ptr<Plugin>(Attributes)>;

class Creator : public nvinfer1::IPluginCreatorV3One {
public:
    Creator(ops::Op const& op, Maker maker)
        : mOp(&op),
          mMaker(std::move(maker)),
          mFields(listedFields(op)),
          mFieldCollection{static_cast<int32_t>(mFields.size()), mFields.data()} {}
    Creator(Creator const&) = delete;

    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return mOp->name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override {
        return ops::kPluginVersion;
    }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override {
        return ops::kPluginNamespace;
    }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override {
        return &mFieldCollection;
    }

    // Null, and a logged message, for fields that make no such plugin.
    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name,
                                      nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        return guarded<nvinfer1::IPluginV3*>(mOp->name, nullptr, [&] {
            // An engine holds every attribute; in a file some may be left at their defaults.
            bool const allRequired = phase == nvinfer1::TensorRTPhase::kRUNTIME;
            try {
                return mMaker(Attributes(*mOp, fields, allRequired)).release();
            } catch (PluginError const& error) {
                std::string const node = name == nullptr ? "" : name;
                throw PluginError("node '" + node + "': " + error.what());
            }
        });
    }

private:
    ops::Op const* mOp;
    Maker mMaker;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection;
};

}  // namespace lrq::trt
