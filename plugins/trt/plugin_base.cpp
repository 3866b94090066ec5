#include "plugin_base.h"

using namespace nvinfer1;

namespace lrq::trt {
namespace {

constexpr int32_t kDone = 0;
constexpr int32_t kFailed = -1;

LrqType typeOf(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return LRQ_FLOAT;
        case DataType::kHALF:
            return LRQ_HALF;
        case DataType::kBF16:
            return LRQ_BFLOAT16;
        default:
            throw PluginError("x is no FP32, FP16 or BF16 tensor");
    }
}

bool isActivation(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

}  // namespace

Plugin::Plugin(ops::Op const& op, Attributes attributes)
    : mOp(&op),
      mAttributes(std::move(attributes)),
      mDescription(std::string(op.name) + " " + mAttributes.description()) {}

int32_t Plugin::input(char const* name) const {
    int32_t const index = ops::inputIndex(*mOp, name);
    if (index < 0) {
        throw std::logic_error("op " + std::string(mOp->name) + " has no input '" + name + "'");
    }
    return index;
}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
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

IPluginV3* Plugin::clone() noexcept {
    return guarded<IPluginV3*>(name(), nullptr, [&] { return copy().release(); });
}

// INT4 codes in storage; every other width, and words, are INT8.
DataType Plugin::wantedType(ops::Element element, DataType activation) const {
    switch (element) {
        case ops::Element::kActivation:
            return activation;
        case ops::Element::kFloat:
            return DataType::kFLOAT;
        case ops::Element::kInt8:
            return DataType::kINT8;
        case ops::Element::kCodes:
            return mAttributes.integer("bits") == 4 &&
                           mAttributes.textOr("layout", "storage") == "storage"
                       ? DataType::kINT4
                       : DataType::kINT8;
    }
    throw std::logic_error("an input of unknown element type");
}

// The type that all activations of a node have: that of its first input, if this is one.
DataType Plugin::activationType(DataType first) const {
    return mOp->inputs[0].element == ops::Element::kActivation ? first : DataType::kFLOAT;
}

bool Plugin::takes(ops::Element element, DataType type, DataType activation) const {
    return type == wantedType(element, activation) &&
           (element != ops::Element::kActivation || isActivation(type));
}

void Plugin::checkCounts(int32_t inputCount, int32_t outputCount) const {
    if (inputCount != mOp->inputCount || outputCount != getNbOutputs()) {
        throw PluginError("got " + std::to_string(inputCount) + " inputs and " +
                          std::to_string(outputCount) + " outputs, needed " +
                          std::to_string(mOp->inputCount) + " and " +
                          std::to_string(getNbOutputs()));
    }
}

int32_t Plugin::getOutputDataTypes(DataType* outputs, int32_t outputCount, DataType const* inputs,
                                   int32_t inputCount) const noexcept {
    return guarded<int32_t>(name(), kFailed, [&] {
        checkCounts(inputCount, outputCount);
        DataType const activation = activationType(inputs[0]);
        for (int32_t index = 0; index < inputCount; ++index) {
            if (!takes(mOp->inputs[index].element, inputs[index], activation)) {
                throw PluginError("input '" + std::string(mOp->inputs[index].name) +
                                  "' has a type that the op does not take: " +
                                  std::to_string(static_cast<int32_t>(inputs[index])) +
                                  " of nvinfer1::DataType");
            }
        }
        outputs[0] = wantedType(mOp->output.element, activation);
        return kDone;
    });
}

void Plugin::check(Shapes const& shapes) const {
    if (shapes[0].nbDims < 1) {
        throw PluginError("input '" + std::string(mOp->inputs[0].name) +
                          "' is a scalar, needed at least one axis");
    }
    checkShapes(shapes);
}

int32_t Plugin::getOutputShapes(DimsExprs const* inputs, int32_t inputCount, DimsExprs const*,
                                int32_t, DimsExprs* outputs, int32_t outputCount,
                                IExprBuilder& builder) noexcept {
    return guarded<int32_t>(name(), kFailed, [&] {
        checkCounts(inputCount, outputCount);
        Shapes shapes(static_cast<size_t>(inputCount));
        for (int32_t index = 0; index < inputCount; ++index) {
            shapes[index].nbDims = inputs[index].nbDims;
            for (int32_t axis = 0; axis < inputs[index].nbDims; ++axis) {
                IDimensionExpr const& size = *inputs[index].d[axis];
                shapes[index].d[axis] = size.isConstant() ? size.getConstantValue() : kUnknown;
            }
        }
        check(shapes);
        std::vector<OutputAxis> const axes = outputAxes(shapes);
        outputs[0].nbDims = static_cast<int32_t>(axes.size());
        for (int32_t axis = 0; axis < outputs[0].nbDims; ++axis) {
            OutputAxis const& from = axes[axis];
            outputs[0].d[axis] =
                from.axisOfX == kFixed ? builder.constant(from.size) : inputs[0].d[from.axisOfX];
        }
        return kDone;
    });
}

bool Plugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors,
                                       int32_t inputCount, int32_t outputCount) noexcept {
    return guarded<bool>(name(), false, [&] {
        checkCounts(inputCount, outputCount);
        PluginTensorDesc const& tensor = tensors[position].desc;
        ops::Tensor const& wanted = position < inputCount ? mOp->inputs[position] : mOp->output;
        return tensor.format == TensorFormat::kLINEAR &&
               takes(wanted.element, tensor.type, activationType(tensors[0].desc.type));
    });
}

// Bounds of the profile are not checked against each other: TensorRT derives those of a tensor
// inside the network, and they may be wider than its sizes will ever be.
int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t inputCount,
                                DynamicPluginTensorDesc const*, int32_t outputCount) noexcept {
    return guarded<int32_t>(name(), kFailed, [&] {
        checkCounts(inputCount, outputCount);
        Shapes shapes;
        for (int32_t index = 0; index < inputCount; ++index) {
            shapes.push_back(inputs[index].desc.dims);
        }
        check(shapes);
        return kDone;
    });
}

// There is no way to refuse here: what the kernels refuse is said, and the largest sizes are refused
// by enqueue. It does not tell us how much was reserved: smaller sizes rely on needing no more.
size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t inputCount,
                                DynamicPluginTensorDesc const*, int32_t) const noexcept {
    return guarded<size_t>(name(), 0, [&] {
        Shapes largest;
        for (int32_t index = 0; index < inputCount; ++index) {
            largest.push_back(inputs[index].max);
        }
        LrqType const type = typeOf(activationType(inputs[0].desc.type));
        return static_cast<size_t>(workspaceBytes(largest, type));
    });
}

Shapes Plugin::known(PluginTensorDesc const* inputs) const {
    Shapes shapes;
    for (int32_t index = 0; index < mOp->inputCount; ++index) {
        shapes.push_back(inputs[index].dims);
    }
    return shapes;
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* inputs, int32_t inputCount,
                              PluginTensorDesc const*, int32_t outputCount) noexcept {
    return guarded<int32_t>(name(), kFailed, [&] {
        checkCounts(inputCount, outputCount);
        Shapes const shapes = known(inputs);
        check(shapes);
        checkTokens(shapes);
        return kDone;
    });
}

int32_t Plugin::enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const* outputs,
                        void const* const* inputData, void* const* outputData, void* workspace,
                        cudaStream_t stream) noexcept {
    return guarded<int32_t>(name(), kFailed, [&] {
        for (int32_t axis = 0; axis < outputs[0].dims.nbDims; ++axis) {
            if (outputs[0].dims.d[axis] == 0) {
                return kDone;  // nothing to compute
            }
        }
        LrqType const type = typeOf(activationType(inputs[0].type));
        int32_t const status =
            launch({known(inputs), inputData, outputData[0], type, workspace, stream});
        if (status != 0) {
            throw PluginError(lrqKernelsError());
        }
        return kDone;
    });
}

IPluginV3* Plugin::attachToContext(IPluginResourceContext*) noexcept {
    return guarded<IPluginV3*>(name(), nullptr, [&] {
        std::unique_ptr<Plugin> attached = copy();
        attached->attach();
        return attached.release();
    });
}

PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
    return guarded<PluginFieldCollection const*>(name(), nullptr, [&] {
        mFields = mAttributes.serialized();
        mFieldCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mFieldCollection;
    });
}

}  // namespace lrq::trt
