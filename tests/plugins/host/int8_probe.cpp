// Two plugins that hand each other an INT8 tensor, as a lowering might one day have a rotation hand
// its quantized tokens to several products. What TensorRT makes of that is all that is asked: they
// compute nothing.
//
//   ProbeQuantize(x float (..., n))                         ->  q INT8 (..., n), scale float (...,
//   n) ProbeProduct(q INT8 (..., n), scale float (..., n))     ->  y float (..., n)
#include <iterator>
#include <vector>

#include "NvInfer.h"
#include "export.h"

using namespace nvinfer1;

namespace {

struct Op {
    char const* name;
    std::vector<DataType> inputs;
    std::vector<DataType> outputs;
};

Op const kOps[] = {
    {"ProbeQuantize", {DataType::kFLOAT}, {DataType::kINT8, DataType::kFLOAT}},
    {"ProbeProduct", {DataType::kINT8, DataType::kFLOAT}, {DataType::kFLOAT}},
};

PluginFieldCollection const kNoFields{0, nullptr};

class Probe : public IPluginV3,
              public IPluginV3OneCore,
              public IPluginV3OneBuild,
              public IPluginV3OneRuntime {
public:
    explicit Probe(Op const& op) : mOp(op) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE:
                return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD:
                return static_cast<IPluginV3OneBuild*>(this);
            default:
                return static_cast<IPluginV3OneRuntime*>(this);
        }
    }
    IPluginV3* clone() noexcept override { return new Probe(mOp); }
    AsciiChar const* getPluginName() const noexcept override { return mOp.name; }
    AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
    int32_t getNbOutputs() const noexcept override {
        return static_cast<int32_t>(mOp.outputs.size());
    }
    int32_t getOutputDataTypes(DataType* outputs, int32_t count, DataType const*,
                               int32_t) const noexcept override {
        for (int32_t index = 0; index < count; ++index) {
            outputs[index] = mOp.outputs[index];
        }
        return 0;
    }
    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t,
                            DimsExprs* outputs, int32_t count, IExprBuilder&) noexcept override {
        for (int32_t index = 0; index < count; ++index) {
            outputs[index] = inputs[0];
        }
        return 0;
    }
    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors,
                                   int32_t inputCount, int32_t) noexcept override {
        DataType const wanted =
            position < inputCount ? mOp.inputs[position] : mOp.outputs[position - inputCount];
        PluginTensorDesc const& tensor = tensors[position].desc;
        return tensor.type == wanted && tensor.format == TensorFormat::kLINEAR;
    }
    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return 0;
    }
    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*,
                          int32_t) noexcept override {
        return 0;
    }
    int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const*,
                    void* const*, void*, cudaStream_t) noexcept override {
        return 1;
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &kNoFields; }

private:
    Op const& mOp;
};

class ProbeCreator : public IPluginCreatorV3One {
public:
    explicit ProbeCreator(Op const& op) : mOp(op) {}
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const*,
                            TensorRTPhase) noexcept override {
        return new Probe(mOp);
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &kNoFields; }
    AsciiChar const* getPluginName() const noexcept override { return mOp.name; }
    AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

private:
    Op const& mOp;
};

}  // namespace

extern "C" LRQ_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static ProbeCreator creators[] = {ProbeCreator(kOps[0]), ProbeCreator(kOps[1])};
    static IPluginCreatorInterface* const listed[] = {&creators[0], &creators[1]};
    count = static_cast<int32_t>(std::size(listed));
    return listed;
}

extern "C" LRQ_EXPORT void setLoggerFinder(ILoggerFinder*) {}
