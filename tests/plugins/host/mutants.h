// Wrong versions of a plugin: a right one behind a wrapper that does one thing wrong. Each must be
// caught.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "NvInfer.h"
#include "memory.h"

enum class Kind {
    kRight,  // nothing: what the wrapper itself does is not wrong
    kWrongOutputType,
    kWrongOutputShape,
    kFixedOutputShape,
    kForgetsToCheckShapes,
    kForgetsToCheckTypes,
    kTakesAnyFormat,
    kTakesNoHalf,
    kTakesWrongProfiles,
    kWrongNamespace,
    kWrongVersion,
    kLosesField,
    kChangesField,
    kCannotBeCloned,
    kNoTimingId,
    kTimingIdOfShapes,
    kTimingIdOfOpAlone,
    kNoWorkspace,
    kWritesPastOutput,
    kWritesBeforeOutput,
    kWritesPastWorkspace,
    kWritesInput,
    kDoesNothing,
    kOneWrongElement,
    kFailsToRun,
    // Of the creator.
    kFillsInLostFields,
    kDropsUnknownFields,
    kListsNoFields,
    kRefusesSilently,
};

struct Mutant {
    Kind kind;
    char const* name;
};

inline constexpr Mutant kMutants[] = {
    {Kind::kRight, "right"},
    {Kind::kWrongOutputType, "wrong_output_type"},
    {Kind::kWrongOutputShape, "wrong_output_shape"},
    {Kind::kFixedOutputShape, "fixed_output_shape"},
    {Kind::kForgetsToCheckShapes, "forgets_to_check_shapes"},
    {Kind::kForgetsToCheckTypes, "forgets_to_check_types"},
    {Kind::kTakesAnyFormat, "takes_any_format"},
    {Kind::kTakesNoHalf, "takes_no_half"},
    {Kind::kTakesWrongProfiles, "takes_wrong_profiles"},
    {Kind::kWrongNamespace, "wrong_namespace"},
    {Kind::kWrongVersion, "wrong_version"},
    {Kind::kLosesField, "loses_field"},
    {Kind::kChangesField, "changes_field"},
    {Kind::kCannotBeCloned, "cannot_be_cloned"},
    {Kind::kNoTimingId, "no_timing_id"},
    {Kind::kTimingIdOfShapes, "timing_id_of_shapes"},
    {Kind::kTimingIdOfOpAlone, "timing_id_of_op_alone"},
    {Kind::kNoWorkspace, "no_workspace"},
    {Kind::kWritesPastOutput, "writes_past_output"},
    {Kind::kWritesBeforeOutput, "writes_before_output"},
    {Kind::kWritesPastWorkspace, "writes_past_workspace"},
    {Kind::kWritesInput, "writes_input"},
    {Kind::kDoesNothing, "does_nothing"},
    {Kind::kOneWrongElement, "one_wrong_element"},
    {Kind::kFailsToRun, "fails_to_run"},
    {Kind::kFillsInLostFields, "fills_in_lost_fields"},
    {Kind::kDropsUnknownFields, "drops_unknown_fields"},
    {Kind::kListsNoFields, "lists_no_fields"},
    {Kind::kRefusesSilently, "refuses_silently"},
};

// A plugin that hands every question to another one, but for what its kind says.
class MutantPlugin : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
public:
    MutantPlugin(nvinfer1::IPluginV3* right, Kind kind) : mRight(right), mKind(kind) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;
    int32_t getNbOutputs() const noexcept override;
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
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;
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

private:
    nvinfer1::IPluginV3OneCore& core() const;
    nvinfer1::IPluginV3OneBuild& build() const;
    nvinfer1::IPluginV3OneRuntime& runtime() const;

    std::unique_ptr<nvinfer1::IPluginV3> mRight;
    Kind mKind;
    std::string mTimingId;
    size_t mWorkspaceBytes{0};
    int32_t mOtherInteger{0};
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

class MutantCreator : public nvinfer1::IPluginCreatorV3One {
public:
    MutantCreator(nvinfer1::IPluginCreatorV3One& right, Kind kind) : mRight(right), mKind(kind) {}

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name,
                                      nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override {
        return mRight.getPluginName();
    }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override {
        return mRight.getPluginVersion();
    }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override {
        return mRight.getPluginNamespace();
    }

private:
    nvinfer1::IPluginCreatorV3One& mRight;
    Kind mKind;
    nvinfer1::PluginFieldCollection mNone{};
};
