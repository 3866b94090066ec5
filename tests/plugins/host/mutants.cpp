#include "mutants.h"

#include <algorithm>

using namespace nvinfer1;

namespace {

constexpr uint8_t kStain = 0x3c;

// What lies at `offset` from a device pointer becomes kStain.
void stain(void const* data, int64_t offset) {
    auto* const byte = static_cast<uint8_t*>(const_cast<void*>(data)) + offset;
#if defined(LRQ_HOST_ON_GPU)
    cudaDeviceSynchronize();
    cudaMemset(byte, kStain, 1);
#else
    *byte = kStain;
#endif
}

int64_t bytesOf(PluginTensorDesc const& tensor) {
    int64_t count = tensor.type == DataType::kFLOAT ? 4 : 2;
    for (int32_t axis = 0; axis < tensor.dims.nbDims; ++axis) {
        count *= tensor.dims.d[axis];
    }
    return count;
}

}  // namespace

IPluginV3OneCore& MutantPlugin::core() const {
    return *static_cast<IPluginV3OneCore*>(
        mRight->getCapabilityInterface(PluginCapabilityType::kCORE));
}
IPluginV3OneBuild& MutantPlugin::build() const {
    return *static_cast<IPluginV3OneBuild*>(
        mRight->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
IPluginV3OneRuntime& MutantPlugin::runtime() const {
    return *static_cast<IPluginV3OneRuntime*>(
        mRight->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

IPluginCapability* MutantPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* MutantPlugin::clone() noexcept {
    return mKind == Kind::kCannotBeCloned ? nullptr : new MutantPlugin(mRight->clone(), mKind);
}

AsciiChar const* MutantPlugin::getPluginName() const noexcept {
    return core().getPluginName();
}
AsciiChar const* MutantPlugin::getPluginVersion() const noexcept {
    return mKind == Kind::kWrongVersion ? "2" : core().getPluginVersion();
}
AsciiChar const* MutantPlugin::getPluginNamespace() const noexcept {
    return mKind == Kind::kWrongNamespace ? "lrq" : core().getPluginNamespace();
}

int32_t MutantPlugin::getNbOutputs() const noexcept {
    return build().getNbOutputs();
}

int32_t MutantPlugin::getOutputDataTypes(DataType* outputs, int32_t outputCount,
                                         DataType const* inputs,
                                         int32_t inputCount) const noexcept {
    int32_t const status = build().getOutputDataTypes(outputs, outputCount, inputs, inputCount);
    if (mKind == Kind::kWrongOutputType) {
        outputs[0] = outputs[0] == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
    }
    return mKind == Kind::kForgetsToCheckTypes ? 0 : status;
}

int32_t MutantPlugin::getOutputShapes(DimsExprs const* inputs, int32_t inputCount,
                                      DimsExprs const* shapeInputs, int32_t shapeInputCount,
                                      DimsExprs* outputs, int32_t outputCount,
                                      IExprBuilder& builder) noexcept {
    int32_t const status = build().getOutputShapes(inputs, inputCount, shapeInputs, shapeInputCount,
                                                   outputs, outputCount, builder);
    int32_t const last = outputs[0].nbDims - 1;
    if (status == 0 && mKind == Kind::kWrongOutputShape) {
        outputs[0].d[last] = builder.constant(outputs[0].d[last]->getConstantValue() + 1);
    }
    if (status == 0 && mKind == Kind::kFixedOutputShape && last > 0) {
        outputs[0].d[0] = builder.constant(2);
    }
    return status;
}

bool MutantPlugin::supportsFormatCombination(int32_t position,
                                             DynamicPluginTensorDesc const* tensors,
                                             int32_t inputCount, int32_t outputCount) noexcept {
    if (mKind == Kind::kTakesNoHalf && tensors[position].desc.type == DataType::kHALF) {
        return false;
    }
    if (mKind == Kind::kTakesAnyFormat) {
        DynamicPluginTensorDesc linear[16];
        std::copy_n(tensors, inputCount + outputCount, linear);
        linear[position].desc.format = TensorFormat::kLINEAR;
        return build().supportsFormatCombination(position, linear, inputCount, outputCount);
    }
    return build().supportsFormatCombination(position, tensors, inputCount, outputCount);
}

int32_t MutantPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t inputCount,
                                      DynamicPluginTensorDesc const* outputs,
                                      int32_t outputCount) noexcept {
    if (mKind == Kind::kTimingIdOfShapes) {
        mTimingId = "of " + std::to_string(inputs[0].max.d[0]) + " tokens";
    }
    int32_t const status = build().configurePlugin(inputs, inputCount, outputs, outputCount);
    return mKind == Kind::kTakesWrongProfiles ? 0 : status;
}

size_t MutantPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t inputCount,
                                      DynamicPluginTensorDesc const* outputs,
                                      int32_t outputCount) const noexcept {
    return mKind == Kind::kNoWorkspace
               ? 0
               : build().getWorkspaceSize(inputs, inputCount, outputs, outputCount);
}

char const* MutantPlugin::getTimingCacheID() noexcept {
    switch (mKind) {
        case Kind::kNoTimingId:
            return nullptr;
        case Kind::kTimingIdOfShapes:
            mTimingId += getPluginName();
            return mTimingId.c_str();
        case Kind::kTimingIdOfOpAlone:
            return getPluginName();
        default:
            return build().getTimingCacheID();
    }
}

char const* MutantPlugin::getMetadataString() noexcept {
    return build().getMetadataString();
}

int32_t MutantPlugin::onShapeChange(PluginTensorDesc const* inputs, int32_t inputCount,
                                    PluginTensorDesc const* outputs, int32_t outputCount) noexcept {
    int32_t const status = runtime().onShapeChange(inputs, inputCount, outputs, outputCount);
    std::vector<DynamicPluginTensorDesc> sizes;
    for (int32_t index = 0; index < inputCount; ++index) {
        sizes.push_back(
            {inputs[index], inputs[index].dims, inputs[index].dims, inputs[index].dims});
    }
    mWorkspaceBytes =
        status == 0 ? build().getWorkspaceSize(sizes.data(), inputCount, nullptr, 0) : 0;
    return mKind == Kind::kForgetsToCheckShapes ? 0 : status;
}

int32_t MutantPlugin::enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const* outputs,
                              void const* const* inputData, void* const* outputData,
                              void* workspace, cudaStream_t stream) noexcept {
    if (mKind == Kind::kDoesNothing) {
        return 0;
    }
    if (mKind == Kind::kFailsToRun) {
        return 1;
    }
    int32_t const status =
        runtime().enqueue(inputs, outputs, inputData, outputData, workspace, stream);
    switch (mKind) {
        case Kind::kWritesPastOutput:
            stain(outputData[0], bytesOf(outputs[0]));
            break;
        case Kind::kWritesBeforeOutput:
            stain(outputData[0], -1);
            break;
        case Kind::kOneWrongElement:
            stain(outputData[0], bytesOf(outputs[0]) - 1);
            break;
        case Kind::kWritesPastWorkspace:
            stain(workspace, static_cast<int64_t>(mWorkspaceBytes));
            break;
        case Kind::kWritesInput:
            stain(inputData[0], 0);
            break;
        default:
            break;
    }
    return status;
}

IPluginV3* MutantPlugin::attachToContext(IPluginResourceContext* context) noexcept {
    IPluginV3* const attached = runtime().attachToContext(context);
    return attached == nullptr ? nullptr : new MutantPlugin(attached, mKind);
}

PluginFieldCollection const* MutantPlugin::getFieldsToSerialize() noexcept {
    PluginFieldCollection const* const right = runtime().getFieldsToSerialize();
    mFields.assign(right->fields, right->fields + right->nbFields);
    if (mKind == Kind::kLosesField) {
        mFields.pop_back();
    }
    for (PluginField& field : mFields) {
        if (mKind == Kind::kChangesField && field.type == PluginFieldType::kINT32) {
            std::memcpy(&mOtherInteger, field.data, sizeof(mOtherInteger));
            mOtherInteger *= 2;
            field.data = &mOtherInteger;
            break;
        }
    }
    mFieldCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    return &mFieldCollection;
}

IPluginV3* MutantCreator::createPlugin(AsciiChar const* name, PluginFieldCollection const* fields,
                                       TensorRTPhase phase) noexcept {
    std::vector<PluginField> passed(fields->fields, fields->fields + fields->nbFields);
    if (mKind == Kind::kDropsUnknownFields) {
        PluginFieldCollection const* const listed = mRight.getFieldNames();
        auto const isUnknown = [&](PluginField const& field) {
            for (int32_t index = 0; index < listed->nbFields; ++index) {
                if (std::strcmp(listed->fields[index].name, field.name) == 0) {
                    return false;
                }
            }
            return true;
        };
        passed.erase(std::remove_if(passed.begin(), passed.end(), isUnknown), passed.end());
    }
    if (mKind == Kind::kFillsInLostFields) {
        phase = TensorRTPhase::kBUILD;
    }
    if (mKind == Kind::kRefusesSilently && passed.empty()) {
        return nullptr;
    }
    PluginFieldCollection const collection{static_cast<int32_t>(passed.size()), passed.data()};
    IPluginV3* const right = mRight.createPlugin(name, &collection, phase);
    return right == nullptr ? nullptr : new MutantPlugin(right, mKind);
}

PluginFieldCollection const* MutantCreator::getFieldNames() noexcept {
    return mKind == Kind::kListsNoFields ? &mNone : mRight.getFieldNames();
}
