#include "conformance.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <set>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fields.h"
#include "guarded_buffer.h"
#include "replay.h"

using namespace nvinfer1;

namespace {

constexpr size_t kMostSerialized = 1024;  // bytes: metadata, never weights
constexpr int32_t kTypes = 11;            // of nvinfer1::DataType, FP4 included
constexpr int32_t kFormats = 13;          // of nvinfer1::TensorFormat
constexpr int64_t kSizeOfAxis = 1000;     // stands for the size of axis 0 where it is not known

using Plugin = std::unique_ptr<IPluginV3>;

void need(bool holds, std::string const& otherwise) {
    if (!holds) {
        throw Failure(otherwise);
    }
}

std::string text(Dims const& dims) {
    std::string sizes;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
        sizes += " " + std::to_string(dims.d[axis]);
    }
    return sizes;
}

int64_t elements(Dims const& dims) {
    int64_t count = 1;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
        count *= dims.d[axis];
    }
    return count;
}

bool isActivation(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

double element(std::vector<uint8_t> const& bytes, DataType type, size_t index) {
    switch (type) {
        case DataType::kHALF:
            return __half2float(reinterpret_cast<__half const*>(bytes.data())[index]);
        case DataType::kBF16:
            return __bfloat162float(reinterpret_cast<__nv_bfloat16 const*>(bytes.data())[index]);
        case DataType::kFLOAT:
            return reinterpret_cast<float const*>(bytes.data())[index];
        default:
            throw std::runtime_error("an output of a type that no op has");
    }
}

double nmse(std::vector<uint8_t> const& got, Tensor const& wanted) {
    double error = 0;
    double power = 0;
    for (size_t index = 0; index < static_cast<size_t>(elements(wanted.dims)); ++index) {
        double const exact = element(wanted.bytes, wanted.type, index);
        double const difference = element(got, wanted.type, index) - exact;
        error += difference * difference;
        power += exact * exact;
    }
    return power > 0 ? error / power : error;
}

class Walk {
public:
    Walk(IPluginCreatorV3One& creator, Case const& given, Logger& logger)
        : mCreator(creator), mCase(given), mLogger(logger) {}

    void theCreatorIsFound() const;
    void badFieldsAreRefused();
    void defaultsAreSpelledOut();
    void thePluginSaysWhatItIs();
    void typesAreInferred();
    void shapesAreInferred();
    void formatsAreChosen();
    void sizesAreConfigured(TimingIds& timings);
    void whatIsSerializedMakesTheSame();
    void badShapesAreRefused();
    void resultsAreRight();
    void noTokensAreNoWork();

private:
    using Change = std::function<void(Fields&)>;

    Plugin make(Fields& fields, TensorRTPhase phase) {
        return Plugin(mCreator.createPlugin("node", fields.collection(), phase));
    }
    std::string textOf(std::string const& name) const {
        for (Attribute const& attribute : mCase.attributes) {
            if (attribute.name == name) {
                return std::get<std::string>(attribute.value);
            }
        }
        throw std::runtime_error("a case without " + name);
    }
    Fields fields() { return Fields::ofNode(mCase.attributes, *mCreator.getFieldNames()); }
    Plugin made() {
        Fields given = fields();
        Plugin plugin = make(given, TensorRTPhase::kBUILD);
        succeeds(plugin != nullptr, "is not made from the node's own fields");
        return plugin;
    }
    // As an engine is loaded: from what the plugin of the build phase serialized.
    Plugin loaded() {
        Fields kept = Fields::copyOf(*runtime(*made()).getFieldsToSerialize());
        Plugin plugin = make(kept, TensorRTPhase::kRUNTIME);
        succeeds(plugin != nullptr, "is not made from what it serialized");
        return plugin;
    }
    // As `need`; what was logged last, by then, says why.
    void succeeds(bool holds, std::string const& otherwise) const {
        need(holds, otherwise + ": " + (mLogger.errors.empty() ? "" : mLogger.errors.back()));
    }

    template <typename Interface>
    static Interface& capability(IPluginV3& plugin, PluginCapabilityType type) {
        IPluginCapability* const found = plugin.getCapabilityInterface(type);
        need(found != nullptr, "lacks a capability");
        return *static_cast<Interface*>(found);
    }
    static IPluginV3OneBuild& build(IPluginV3& plugin) {
        return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    }
    static IPluginV3OneRuntime& runtime(IPluginV3& plugin) {
        return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    }

    // Runs what must fail: it does, and says why.
    void refused(std::string const& what, std::function<bool()> const& fails) {
        size_t const before = mLogger.errors.size();
        need(fails(), "takes " + what);
        need(mLogger.errors.size() > before, "refuses " + what + " without a word");
    }
    void fieldsRefused(std::string const& what, TensorRTPhase phase, Change const& change) {
        Fields given = fields();
        change(given);
        refused(what, [&] { return make(given, phase) == nullptr; });
    }

    bool isToken(Tensor const& input) const {
        return input.name == "x" || input.name == "residual";
    }
    bool hasTokens() const { return mCase.inputs[0].name == "x"; }
    int32_t inputCount() const { return static_cast<int32_t>(mCase.inputs.size()); }
    std::vector<DataType> types() const;
    std::vector<PluginTensorDesc> descriptions() const;
    std::vector<DynamicPluginTensorDesc> dynamicDescriptions() const;
    PluginTensorDesc outputDescription() const {
        return {mCase.output.dims, mCase.output.type, TensorFormat::kLINEAR, 1.0f};
    }
    bool infers(ExpressionBuilder& builder, std::vector<DimsExprs> const& inputs,
                DimsExprs& output);
    std::vector<DimsExprs> expressions(ExpressionBuilder& builder) const;
    size_t workspaceBytes();
    void runContext(IPluginV3OneRuntime& context, std::string const& how,
                    Replay const& replay = runNow);
    // Where there is a GPU; the CPU has nothing to capture.
    void runInGraph([[maybe_unused]] IPluginV3OneRuntime& context,
                    [[maybe_unused]] std::string const& how) {
#if defined(LRQ_HOST_ON_GPU)
        runContext(context, how, replayed);
#endif
    }

    IPluginCreatorV3One& mCreator;
    Case const& mCase;
    Logger& mLogger;
};

void Walk::theCreatorIsFound() const {
    need(std::string(mCreator.getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE",
         "is no V3 creator");
    need(mCreator.getPluginName() == mCase.op, "is the creator of another op");
    need(std::string(mCreator.getPluginVersion()) == "1", "has another version than nodes ask for");
    need(std::string(mCreator.getPluginNamespace()).empty(), "has a namespace");
    PluginFieldCollection const* const listed = mCreator.getFieldNames();
    std::set<std::string> names;
    for (int32_t index = 0; index < listed->nbFields; ++index) {
        names.insert(listed->fields[index].name);
    }
    for (Attribute const& attribute : mCase.attributes) {
        need(names.count(attribute.name) == 1, "does not list the attribute " + attribute.name);
    }
    need(names.size() == mCase.attributes.size(), "lists attributes that the op does not have");
}

void Walk::badFieldsAreRefused() {
    TensorRTPhase const phase = TensorRTPhase::kBUILD;
    bool const isLinear = fields().has("rotation");
    bool const isRotated = isLinear && textOf("rotation") != "none";
    for (Attribute const& attribute : mCase.attributes) {
        std::string const& name = attribute.name;
        bool const isInteger = std::holds_alternative<int32_t>(attribute.value);
        fieldsRefused(name + " lost from an engine", TensorRTPhase::kRUNTIME,
                      [&](Fields& given) { given.remove(name); });
        fieldsRefused(name + " twice", phase, [&](Fields& given) { given.add(attribute); });
        fieldsRefused(name + " without data", phase,
                      [&](Fields& given) { given.at(name).data = nullptr; });
        fieldsRefused(name + " of another type", phase, [&](Fields& given) {
            given.at(name).type = isInteger ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
        });
        fieldsRefused(name + " of a wrong value", phase, [&](Fields& given) {
            bool const unread = isLinear && !isRotated && name == "block";
            Attribute wrong{name, {}};
            if (isInteger) {
                wrong.value = unread ? int32_t{1} : int32_t{-7};
            } else if (std::holds_alternative<float>(attribute.value)) {
                wrong.value = std::nanf("");
            } else {
                wrong.value = std::string("other");
            }
            given.remove(name);
            given.add(wrong);
            if (unread) {
                given.remove("cols");
            }
        });
    }
    auto const withColumns = [](int32_t cols) {
        return [cols](Fields& given) {
            given.remove("cols");
            if (given.has("group_size")) {
                given.remove("group_size");  // all of them
            }
            given.add(Attribute{"cols", cols});
        };
    };
    if (isLinear) {
        fieldsRefused("more columns than a product sums", phase, withColumns(1 << 17));
    }
    if (isRotated) {
        fieldsRefused("a fused block that has no Hadamard matrix", phase, [&](Fields& given) {
            withColumns(9)(given);
            given.remove("block");
            given.add(Attribute{"block", int32_t{9}});
        });
    }
    fieldsRefused("a field that the op does not have", phase,
                  [&](Fields& given) { given.add(Attribute{"surplus", int32_t{1}}); });
    fieldsRefused("no fields at all", TensorRTPhase::kRUNTIME,
                  [&](Fields& given) { given = Fields(); });
}

void Walk::defaultsAreSpelledOut() {
    for (Attribute const& attribute : mCase.attributes) {
        Fields given = fields();
        given.remove(attribute.name);
        Plugin const plugin = make(given, TensorRTPhase::kBUILD);
        if (plugin != nullptr) {
            Fields const kept = Fields::copyOf(*runtime(*plugin).getFieldsToSerialize());
            need(kept.has(attribute.name), "does not serialize the default of " + attribute.name);
        }
    }
}

void Walk::thePluginSaysWhatItIs() {
    Plugin plugin = made();
    auto const& core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
    need(core.getPluginName() == mCase.op, "is a plugin of another op");
    need(std::string(core.getPluginVersion()) == "1", "is of another version");
    need(std::string(core.getPluginNamespace()).empty(), "is in a namespace");
    need(build(*plugin).getNbOutputs() == 1, "has another number of outputs");
    Plugin const clone(plugin->clone());
    need(clone != nullptr, "cannot be cloned");
    Fields const kept = Fields::copyOf(*runtime(*plugin).getFieldsToSerialize());
    plugin.reset();
    need(Fields::copyOf(*runtime(*clone).getFieldsToSerialize()).text() == kept.text(),
         "has a clone that is not its like");
}

std::vector<DataType> Walk::types() const {
    std::vector<DataType> types;
    for (Tensor const& input : mCase.inputs) {
        types.push_back(input.type);
    }
    return types;
}

void Walk::typesAreInferred() {
    Plugin const plugin = made();
    auto const infer = [&](std::vector<DataType> const& inputs, DataType* output) {
        return build(*plugin).getOutputDataTypes(output, 1, inputs.data(),
                                                 static_cast<int32_t>(inputs.size()));
    };
    DataType output = DataType::kBOOL;
    succeeds(infer(types(), &output) == 0, "does not infer the type of its output");
    need(output == mCase.output.type, "infers another type of its output");
    for (int32_t index = 0; index < inputCount(); ++index) {
        std::vector<DataType> wrong = types();
        wrong[index] = DataType::kINT32;
        refused("INT32 as its " + mCase.inputs[index].name,
                [&] { return infer(wrong, &output) != 0; });
        if (index > 0) {
            DataType const given = types()[index];
            wrong[index] = given == DataType::kHALF ? DataType::kBF16 : DataType::kHALF;
            refused("another type as its " + mCase.inputs[index].name,
                    [&] { return infer(wrong, &output) != 0; });
        }
    }
    std::vector<DataType> fewer = types();
    fewer.pop_back();
    refused("too few inputs", [&] { return infer(fewer, &output) != 0; });
}

// Tokens, but for their channels, have sizes that are not known yet.
std::vector<DimsExprs> Walk::expressions(ExpressionBuilder& builder) const {
    std::vector<DimsExprs> inputs;
    for (Tensor const& input : mCase.inputs) {
        DimsExprs& made = inputs.emplace_back();
        made.nbDims = input.dims.nbDims;
        for (int32_t axis = 0; axis < made.nbDims; ++axis) {
            bool const dynamic = isToken(input) && axis + 1 < made.nbDims;
            made.d[axis] = dynamic ? builder.unknown(kSizeOfAxis + axis)
                                   : builder.constant(input.dims.d[axis]);
        }
    }
    return inputs;
}

void Walk::shapesAreInferred() {
    Plugin const plugin = made();
    ExpressionBuilder builder;
    DimsExprs output{};
    auto const infer = [&](std::vector<DimsExprs> const& inputs) {
        return build(*plugin).getOutputShapes(inputs.data(), inputCount(), nullptr, 0, &output, 1,
                                              builder);
    };
    std::vector<DimsExprs> const inputs = expressions(builder);
    succeeds(infer(inputs) == 0, "does not infer the shape of its output");
    Dims const& wanted = mCase.output.dims;
    need(output.nbDims == wanted.nbDims, "infers another number of axes");
    for (int32_t axis = 0; axis < wanted.nbDims; ++axis) {
        bool const dynamic = hasTokens() && axis + 1 < wanted.nbDims;
        int64_t const size = dynamic ? kSizeOfAxis + axis : wanted.d[axis];
        need(static_cast<Expression const*>(output.d[axis])->value == size,
             "infers another size of axis " + std::to_string(axis));
        need(output.d[axis]->isConstant() != dynamic, "does not know which sizes are known");
    }
    for (int32_t index = 0; index < inputCount(); ++index) {
        std::vector<DimsExprs> wrong = inputs;
        int32_t const last = wrong[index].nbDims - 1;
        wrong[index].d[last] = builder.constant(mCase.inputs[index].dims.d[last] + 1);
        refused("a wider " + mCase.inputs[index].name, [&] { return infer(wrong) != 0; });
        wrong[index].nbDims = 0;
        refused("a scalar as its " + mCase.inputs[index].name, [&] { return infer(wrong) != 0; });
    }
}

std::vector<PluginTensorDesc> Walk::descriptions() const {
    std::vector<PluginTensorDesc> made;
    for (Tensor const& input : mCase.inputs) {
        made.push_back({input.dims, input.type, TensorFormat::kLINEAR, 1.0f});
    }
    return made;
}

// Of a profile whose largest sizes are those of the case, and whose others are one token: a plugin
// that plans its workspace by those has too little.
std::vector<DynamicPluginTensorDesc> Walk::dynamicDescriptions() const {
    std::vector<DynamicPluginTensorDesc> made;
    for (int32_t index = 0; index < inputCount(); ++index) {
        PluginTensorDesc known = descriptions()[index];
        Dims const largest = known.dims;
        Dims smallest = largest;
        for (int32_t axis = 0; isToken(mCase.inputs[index]) && axis + 1 < largest.nbDims; ++axis) {
            known.dims.d[axis] = -1;
            smallest.d[axis] = std::min<int64_t>(1, largest.d[axis]);
        }
        made.push_back({known, smallest, largest, smallest});
    }
    return made;
}

// Every type and format at every position, those before it as the case has them, those behind it
// not decided yet.
void Walk::formatsAreChosen() {
    Plugin const plugin = made();
    std::vector<DynamicPluginTensorDesc> const inputs = dynamicDescriptions();
    std::vector<DynamicPluginTensorDesc> right = inputs;
    PluginTensorDesc const output = outputDescription();
    right.push_back({output, output.dims, output.dims, output.dims});
    for (int32_t position = 0; position <= inputCount(); ++position) {
        bool const free = position == 0 && hasTokens();
        std::vector<DynamicPluginTensorDesc> tensors = right;
        for (int32_t later = position + 1; later <= inputCount(); ++later) {
            tensors[later].desc.type = DataType::kBOOL;
            tensors[later].desc.format = TensorFormat::kCHW32;
        }
        for (int32_t pair = 0; pair < kTypes * kFormats; ++pair) {
            auto const type = static_cast<DataType>(pair / kFormats);
            auto const format = static_cast<TensorFormat>(pair % kFormats);
            tensors[position].desc.type = type;
            tensors[position].desc.format = format;
            bool const fits = free ? isActivation(type) : type == right[position].desc.type;
            bool const wanted = fits && format == TensorFormat::kLINEAR;
            bool const taken =
                build(*plugin).supportsFormatCombination(position, tensors.data(), inputCount(), 1);
            need(taken == wanted, std::string(wanted ? "refuses" : "takes") + " type " +
                                      std::to_string(pair / kFormats) + " in format " +
                                      std::to_string(pair % kFormats) + " at position " +
                                      std::to_string(position));
        }
    }
}

void Walk::sizesAreConfigured(TimingIds& timings) {
    Plugin const plugin = made();
    auto const id = [&] {
        char const* const given = build(*plugin).getTimingCacheID();
        need(given != nullptr && *given != '\0', "has no id for the timing cache");
        return std::string(given);
    };
    std::string const before = id();
    PluginTensorDesc const out = outputDescription();
    DynamicPluginTensorDesc const output{out, out.dims, out.dims, out.dims};
    auto const configure = [&](std::vector<DynamicPluginTensorDesc> const& inputs) {
        return build(*plugin).configurePlugin(inputs.data(), inputCount(), &output, 1);
    };
    std::vector<DynamicPluginTensorDesc> const inputs = dynamicDescriptions();
    succeeds(configure(inputs) == 0, "is not configured");
    need(id() == before, "has an id for the timing cache that depends on shapes");
    auto const known = timings.emplace(before, mCase.op + fields().text());
    need(known.first->second == mCase.op + fields().text(), "shares its id with another node");
    char const* const metadata = build(*plugin).getMetadataString();
    need(metadata != nullptr && std::string(metadata).find(mCase.op) == 0, "has no metadata");
    std::vector<DynamicPluginTensorDesc> wrong = inputs;
    Dims& sizes = wrong[0].desc.dims;
    sizes.d[sizes.nbDims - 1] += 1;
    refused("wrong sizes to be configured for", [&] { return configure(wrong) != 0; });
}

void Walk::whatIsSerializedMakesTheSame() {
    Fields const given = fields();
    Plugin const plugin = made();
    Fields const kept = Fields::copyOf(*runtime(*plugin).getFieldsToSerialize());
    need(kept.text().size() <= kMostSerialized, "serializes more than metadata");
    for (Attribute const& attribute : mCase.attributes) {
        Fields one;
        one.add(attribute);
        need(kept.text().find(one.text()) != std::string::npos,
             "does not serialize " + attribute.name + " as it was given");
    }
    Fields const again = Fields::copyOf(*runtime(*loaded()).getFieldsToSerialize());
    need(again.text() == kept.text(), "serializes something else once it is loaded");
}

void Walk::badShapesAreRefused() {
    Plugin const plugin = loaded();
    PluginTensorDesc const output = outputDescription();
    auto const change = [&](std::vector<PluginTensorDesc> const& inputs) {
        return runtime(*plugin).onShapeChange(inputs.data(), inputCount(), &output, 1);
    };
    succeeds(change(descriptions()) == 0, "refuses its own shapes");
    for (int32_t index = 0; index < inputCount(); ++index) {
        Tensor const& input = mCase.inputs[index];
        bool const free =
            isActivation(input.type) && input.dims.nbDims > 1;  // but for the channels
        for (int32_t axis = free ? input.dims.nbDims - 1 : 0; axis < input.dims.nbDims; ++axis) {
            std::vector<PluginTensorDesc> wrong = descriptions();
            wrong[index].dims.d[axis] += 1;
            refused(input.name + " of shape" + text(wrong[index].dims),
                    [&] { return change(wrong) != 0; });
        }
    }
}

size_t Walk::workspaceBytes() {
    Plugin const plugin = made();
    PluginTensorDesc const out = outputDescription();
    DynamicPluginTensorDesc const output{out, out.dims, out.dims, out.dims};
    std::vector<DynamicPluginTensorDesc> const inputs = dynamicDescriptions();
    build(*plugin).configurePlugin(inputs.data(), inputCount(), &output, 1);
    return build(*plugin).getWorkspaceSize(inputs.data(), inputCount(), &output, 1);
}

// One call of enqueue: the result, and everything around it.
void Walk::runContext(IPluginV3OneRuntime& context, std::string const& how, Replay const& replay) {
    std::vector<PluginTensorDesc> const inputs = descriptions();
    PluginTensorDesc const output = outputDescription();
    succeeds(context.onShapeChange(inputs.data(), inputCount(), &output, 1) == 0,
             "refuses its own shapes");
    std::vector<std::unique_ptr<GuardedBuffer>> buffers;
    std::vector<void const*> pointers;
    for (Tensor const& input : mCase.inputs) {
        buffers.push_back(std::make_unique<GuardedBuffer>(input.bytes));
        pointers.push_back(buffers.back()->data());
    }
    GuardedBuffer result(std::vector<uint8_t>(mCase.output.bytes.size(), GuardedBuffer::kSentinel));
    GuardedBuffer workspace(std::vector<uint8_t>(workspaceBytes(), GuardedBuffer::kSentinel));
    void* outputs[] = {result.data()};
    auto const enqueue = [&](cudaStream_t stream) {
        return context.enqueue(inputs.data(), &output, pointers.data(), outputs, workspace.data(),
                               stream);
    };
    succeeds(replay(enqueue) == 0, "cannot be run" + how);
    double const error = nmse(result.read(), mCase.output);
    need(error <= mCase.nmse, "computes something else" + how + ": NMSE " + std::to_string(error));
    need(result.guardsHold(), "writes beside its output" + how);
    need(workspace.guardsHold(), "writes beside its workspace" + how);
    for (int32_t index = 0; index < inputCount(); ++index) {
        need(buffers[index]->isUntouched() && buffers[index]->guardsHold(),
             "writes into or beside its input " + mCase.inputs[index].name + how);
    }
}

void Walk::resultsAreRight() {
    bool const isLinear = mCase.op.find("Linear") != std::string::npos;
    for (char const* residency : {"packed", "int8"}) {
        setenv("LRQ_RESIDENCY", residency, 1);
        Plugin engine = loaded();
        ResourceContext resources;
        Plugin first(runtime(*engine).attachToContext(&resources));
        Plugin second(runtime(*engine).attachToContext(&resources));
        succeeds(first != nullptr && second != nullptr, "cannot be attached");
        std::string const how = " with residency " + std::string(residency);
        // In a graph first: a resident weight cannot be decoded yet, and once more when it is.
        runInGraph(runtime(*first), how + ", in a CUDA graph");
        runContext(runtime(*first), how);
        runContext(runtime(*first), how + ", again");
        runInGraph(runtime(*first), how + ", in a CUDA graph again");
        engine.reset();
        runContext(runtime(*second), how + ", second context");
        first.reset();
        runContext(runtime(*second), how + ", left alone");
    }
    if (isLinear) {
        setenv("LRQ_RESIDENCY", "float", 1);
        ResourceContext resources;
        Plugin const engine = loaded();
        refused("a residency that does not exist",
                [&] { return Plugin(runtime(*engine).attachToContext(&resources)) == nullptr; });
    }
    unsetenv("LRQ_RESIDENCY");
}

void Walk::noTokensAreNoWork() {
    if (!hasTokens()) {
        return;
    }
    std::vector<PluginTensorDesc> inputs = descriptions();
    PluginTensorDesc output = outputDescription();
    output.dims.d[0] = 0;
    for (PluginTensorDesc& input : inputs) {
        bool const perToken = input.dims.nbDims == output.dims.nbDims && isActivation(input.type);
        if (perToken && input.dims.d[0] != 1) {
            input.dims.d[0] = 0;
        }
    }
    inputs[0].dims.d[0] = 0;
    Plugin const plugin = loaded();
    std::vector<void const*> const pointers(inputs.size(), nullptr);
    void* outputs[] = {nullptr};
    succeeds(runtime(*plugin).onShapeChange(inputs.data(), inputCount(), &output, 1) == 0 &&
                 runtime(*plugin).enqueue(inputs.data(), &output, pointers.data(), outputs, nullptr,
                                          nullptr) == 0,
             "cannot be run on no tokens");
}

}  // namespace

void walk(IPluginCreatorV3One& creator, Case const& given, Logger& logger, TimingIds& timings) {
    Walk walk(creator, given, logger);
    walk.theCreatorIsFound();
    walk.badFieldsAreRefused();
    walk.defaultsAreSpelledOut();
    walk.thePluginSaysWhatItIs();
    walk.typesAreInferred();
    walk.shapesAreInferred();
    walk.formatsAreChosen();
    walk.sizesAreConfigured(timings);
    walk.whatIsSerializedMakesTheSame();
    walk.badShapesAreRefused();
    walk.resultsAreRight();
    walk.noTokensAreNoWork();
}
