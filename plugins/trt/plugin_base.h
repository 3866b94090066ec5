// IPluginV3 once for all ops: what TensorRT asks of a plugin, answered from the op's record in
// core/generated/ops.h and from the few functions that a kind of op writes for itself. Those may
// throw PluginError; nothing thrown leaves a function that TensorRT calls.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../core/generated/ops.h"
#include "../kernels/kernels.h"
#include "NvInfer.h"
#include "attributes.h"
#include "log.h"
#include "shapes.h"

namespace lrq::trt {

// The shapes of the inputs, in the op's order; sizes that are not known yet are kUnknown.
using Shapes = std::vector<Dims>;

// One axis of the output: an axis of x, or a size.
struct OutputAxis {
    int32_t axisOfX;  // kFixed: `size`
    int64_t size;
};
constexpr int32_t kFixed = -1;

// One call of enqueue.
struct Launch {
    Shapes shapes;
    void const* const* inputs;
    void* output;
    LrqType type;  // of x
    void* workspace;
    void* stream;
};

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    Plugin(ops::Op const& op, Attributes attributes);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return mOp->name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override {
        return ops::kPluginVersion;
    }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override {
        return ops::kPluginNamespace;
    }

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t outputCount,
                               nvinfer1::DataType const* inputs,
                               int32_t inputCount) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t inputCount,
                            nvinfer1::DimsExprs const* shapeInputs, int32_t shapeInputCount,
                            nvinfer1::DimsExprs* outputs, int32_t outputCount,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position,
                                   nvinfer1::DynamicPluginTensorDesc const* tensors,
                                   int32_t inputCount, int32_t outputCount) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t inputCount,
                            nvinfer1::DynamicPluginTensorDesc const* outputs,
                            int32_t outputCount) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t inputCount,
                            nvinfer1::DynamicPluginTensorDesc const* outputs,
                            int32_t outputCount) const noexcept override;
    char const* getTimingCacheID() noexcept override { return mDescription.c_str(); }
    char const* getMetadataString() noexcept override { return mDescription.c_str(); }

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t inputCount,
                          nvinfer1::PluginTensorDesc const* outputs,
                          int32_t outputCount) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputs,
                    nvinfer1::PluginTensorDesc const* outputs, void const* const* inputData,
                    void* const* outputData, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(
        nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

protected:
    Plugin(Plugin const&) = default;

    // What a kind of op writes for itself.
    virtual std::unique_ptr<Plugin> copy() const = 0;
    // Throws where known sizes disagree with the attributes or each other. x has an axis.
    virtual void checkShapes(Shapes const& shapes) const = 0;
    virtual std::vector<OutputAxis> outputAxes(Shapes const& shapes) const = 0;
    // All sizes are known; of the workspace they are the largest there will be.
    virtual int64_t workspaceBytes(Shapes const&, LrqType) const { return 0; }
    // At least one token. Returns what the kernels return.
    virtual int32_t launch(Launch const& launch) const = 0;
    // On the clone that belongs to an execution context, before its first enqueue.
    virtual void attach() {}

    ops::Op const& op() const { return *mOp; }
    Attributes const& attributes() const { return mAttributes; }
    // The position of an input that the op has.
    int32_t input(char const* name) const;
    bool hasInput(char const* name) const { return ops::inputIndex(*mOp, name) >= 0; }

private:
    char const* name() const { return mOp->name; }
    nvinfer1::DataType wantedType(ops::Element element, nvinfer1::DataType activation) const;
    bool takes(ops::Element element, nvinfer1::DataType type, nvinfer1::DataType activation) const;
    nvinfer1::DataType activationType(nvinfer1::DataType first) const;
    void checkCounts(int32_t inputCount, int32_t outputCount) const;
    void check(Shapes const& shapes) const;
    Shapes known(nvinfer1::PluginTensorDesc const* inputs) const;

    ops::Op const* mOp;
    Attributes mAttributes;
    std::string mDescription;  // the op and its attributes: also the key of timings
    std::vector<nvinfer1::PluginField> mFields;  // made anew by each getFieldsToSerialize
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

}  // namespace lrq::trt
