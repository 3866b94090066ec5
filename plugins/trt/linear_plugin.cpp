// TwinLogLinear, CodebookLinear, Int8Linear, and those with a gate and a residual:
// graphs/ops/token_product.py and gated_residual.py.
#include <cstdlib>

#include "../core/hadamard.h"
#include "plugins.h"
#include "resident_weight.h"
#include "weight.h"

namespace lrq::trt {
namespace {

// How weights stay in memory, from the environment, when an execution context is made: `packed`,
// the default, decodes them in every call; `int8` once for all contexts of an engine.
bool residentAsInt8() {
    char const* const residency = std::getenv("LRQ_RESIDENCY");
    std::string const chosen = residency == nullptr || *residency == '\0' ? "packed" : residency;
    if (chosen != "packed" && chosen != "int8") {
        throw PluginError("LRQ_RESIDENCY is '" + chosen + "', needed packed or int8");
    }
    return chosen == "int8";
}

class LinearPlugin : public Plugin {
public:
    LinearPlugin(ops::Op const& op, Attributes given, LrqFormat format)
        : Plugin(op, std::move(given)),
          mWeight(attributes(), format),
          mResident(std::make_shared<ResidentWeight>()) {
        if (mWeight.cols() > kMaxProductCols) {
            throw PluginError("cols " + std::to_string(mWeight.cols()) + ", needed at most " +
                              std::to_string(kMaxProductCols) + " in a product");
        }
        if (attributes().text("rotation") != "none") {
            mBlock = attributes().integer("block");
            checkBlock();
        }
    }

    void checkBlock() const {
        HadamardFactors factors{};
        if (mBlock < 1 || mWeight.cols() % mBlock != 0) {
            throw PluginError("block " + std::to_string(mBlock) +
                              " of the fused rotation does not divide the " +
                              std::to_string(mWeight.cols()) + " columns");
        }
        if (!factorizeHadamard(mBlock, &factors)) {
            throw PluginError("block " + std::to_string(mBlock) +
                              " of the fused rotation has no Hadamard matrix here");
        }
    }

protected:
    std::unique_ptr<Plugin> copy() const override {
        auto copied = std::make_unique<LinearPlugin>(*this);
        copied->mDecoded = false;
        return copied;
    }

    void attach() override { mInt8 = residentAsInt8() && mWeight.format() != LRQ_INT8; }

    void checkShapes(Shapes const& shapes) const override {
        Dims const& x = shapes[input("x")];
        needSize("x", x, x.nbDims - 1, mWeight.cols());
        mWeight.checkShapes(shapes, op());
        needShape("bias", shapes[input("bias")], {mWeight.rows()});
        if (hasInput("residual")) {
            Dims const y = outputShape(x);
            needBroadcast("gate", shapes[input("gate")], "y", y);
            Dims const& residual = shapes[input("residual")];
            needRank("residual", residual, y.nbDims);
            for (int32_t axis = 0; axis < y.nbDims; ++axis) {
                needSize("residual", residual, axis, y.d[axis]);
            }
        }
    }

    void checkTokens(Shapes const& shapes) const override { tokensOf(shapes); }

    std::vector<OutputAxis> outputAxes(Shapes const& shapes) const override {
        std::vector<OutputAxis> axes;
        for (int32_t axis = 0; axis + 1 < shapes[input("x")].nbDims; ++axis) {
            axes.push_back({axis, 0});
        }
        axes.push_back({kFixed, mWeight.rows()});
        return axes;
    }

    // Always that of residency `packed`: then an engine runs with either.
    int64_t workspaceBytes(Shapes const& shapes, LrqType type) const override {
        alignas(16) static char somewhere[16];  // only which pointers are null matters
        std::vector<void const*> const inputs(shapes.size(), somewhere);
        LrqLinear linear = describe(inputs.data(), type);
        linear.tokens = Tokens(shapes[input("x")], nullptr, 0).counts();
        linear.y = somewhere;
        int64_t const bytes = lrqLinearWorkspace(&linear);
        if (bytes < 0) {
            throw PluginError(lrqKernelsError());
        }
        return bytes;
    }

    int32_t launch(Launch const& launch) const override {
        LrqLinear linear = describe(launch.inputs, launch.type);
        Tokens const tokens = tokensOf(launch.shapes);
        linear.tokens = tokens.counts();
        if (hasInput("residual")) {
            linear.gate = tokens.modulation(launch.shapes[input("gate")], linear.gate.data);
        }
        linear.y = launch.output;
        int64_t const workspaceBytes = lrqLinearWorkspace(&linear);
        int32_t const status = mInt8 ? makeResident(linear, launch.stream) : 0;
        return status != 0 ? status
                           : lrqLinear(&linear, launch.workspace, workspaceBytes, launch.stream);
    }

private:
    Dims outputShape(Dims const& x) const {
        Dims y = x;
        y.d[y.nbDims - 1] = mWeight.rows();
        return y;
    }

    // All but its tokens and where the result goes. The kernels choose by the sizes of each call
    // how to compute it.
    LrqLinear describe(void const* const* inputs, LrqType type) const {
        char const* const levels = mWeight.levelsName();
        LrqLinear linear{};
        linear.x = inputs[input("x")];
        linear.weight =
            mWeight.at(inputs[input("codes")], levels == nullptr ? nullptr : inputs[input(levels)]);
        linear.rowScales = static_cast<float const*>(inputs[input("scale")]);
        linear.bias = static_cast<float const*>(inputs[input("bias")]);
        linear.block = mBlock;
        linear.type = type;
        linear.actBits = attributes().integer("act_bits");
        if (hasInput("residual")) {
            linear.gate.data = inputs[input("gate")];
            linear.residual = inputs[input("residual")];
        }
        return linear;
    }

    // Cut so that the gate, if there is one, has a stride for each part.
    Tokens tokensOf(Shapes const& shapes) const {
        Dims const y = outputShape(shapes[input("x")]);
        if (!hasInput("residual")) {
            return {y, nullptr, 0};
        }
        Dims const* const others[] = {&shapes[input("gate")]};
        return {y, others, 1};
    }

    // Has `linear` read the resident weight, decoded on this context's first call. Every context
    // decodes on a stream of its own, so none waits for another's: the bytes they write are the
    // same. Where that cannot be, `linear` decodes in its workspace, as with residency `packed`.
    int32_t makeResident(LrqLinear& linear, void* stream) const {
        if (!mDecoded && isCaptured(stream)) {
            return 0;
        }
        int8_t* const room = mResident->room(mWeight.rows() * mWeight.cols());
        if (room != nullptr && !mDecoded) {
            int32_t const status = lrqDecode(&linear.weight, room, stream);
            if (status != 0) {
                return status;
            }
            mDecoded = true;
        }
        linear.decoded = room;
        return 0;
    }

    Weight mWeight;
    int32_t mBlock{0};
    bool mInt8{false};
    std::shared_ptr<ResidentWeight> mResident;
    mutable bool mDecoded{false};  // by this clone, which one context runs at a time
};

}  // namespace

std::unique_ptr<Plugin> makeLinear(ops::Op const& op, Attributes attributes, LrqFormat format) {
    return std::make_unique<LinearPlugin>(op, std::move(attributes), format);
}

}  // namespace lrq::trt
