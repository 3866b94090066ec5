// HadamardRotate and the ops that fuse a norm or an activation with it: graphs/ops/rotated.py.
#include "../core/hadamard.h"
#include "plugins.h"

namespace lrq::trt {
namespace {

class RotatePlugin : public Plugin {
public:
    RotatePlugin(ops::Op const& op, Attributes given, LrqPrologue prologue)
        : Plugin(op, std::move(given)), mPrologue(prologue), mBlock(attributes().integer("block")) {
        int32_t const base = attributes().integer("base");
        int32_t const order = attributes().integer("order");
        HadamardFactors factors{};
        if (!factorizeHadamard(mBlock, &factors)) {
            throw PluginError("block " + std::to_string(mBlock) + " has no Hadamard matrix here");
        }
        if (base != factors.base.size || order != factors.base.order) {
            throw PluginError(
                "base " + std::to_string(base) + " and order " + std::to_string(order) +
                ", needed " + std::to_string(factors.base.size) + " and " +
                std::to_string(factors.base.order) + " for block " + std::to_string(mBlock));
        }
        if (isNorm() && attributes().real("epsilon") < 0.0f) {
            throw PluginError("epsilon is negative, needed 0 or more");
        }
    }

protected:
    std::unique_ptr<Plugin> copy() const override { return std::make_unique<RotatePlugin>(*this); }

    void checkShapes(Shapes const& shapes) const override {
        Dims const& x = shapes[input("x")];
        Dims const& signs = shapes[input("signs")];
        int32_t const last = x.nbDims - 1;
        needRank("signs", signs, 1);
        int64_t const channels = signs.d[0];
        if (channels != kUnknown && channels % mBlock != 0) {
            throw PluginError("block " + std::to_string(mBlock) + " does not divide the " +
                              std::to_string(channels) + " channels of signs");
        }
        needSize("x", x, last, channels == kUnknown ? kUnknown : channels * halves());
        if (isNorm()) {
            needBroadcast("scale", shapes[input("scale")], "x", x);
            needBroadcast("shift", shapes[input("shift")], "x", x);
        }
    }

    std::vector<OutputAxis> outputAxes(Shapes const& shapes) const override {
        std::vector<OutputAxis> axes;
        int32_t const last = shapes[input("x")].nbDims - 1;
        for (int32_t axis = 0; axis < last; ++axis) {
            axes.push_back({axis, 0});
        }
        int64_t const channels = shapes[input("signs")].d[0];
        if (channels == kUnknown) {
            throw PluginError("signs has a size that is not known when the engine is built");
        }
        axes.push_back({kFixed, channels});
        return axes;
    }

    int32_t launch(Launch const& launch) const override {
        Dims const& x = launch.shapes[input("x")];
        LrqRotation rotation{};
        rotation.x = launch.inputs[input("x")];
        rotation.signs = launch.inputs[input("signs")];
        rotation.y = launch.output;
        rotation.channels = launch.shapes[input("signs")].d[0];
        rotation.block = mBlock;
        rotation.prologue = mPrologue;
        rotation.type = launch.type;
        if (isNorm()) {
            Dims const& scale = launch.shapes[input("scale")];
            Dims const& shift = launch.shapes[input("shift")];
            Dims const* const others[] = {&scale, &shift};
            Tokens const tokens(x, others, 2);
            rotation.tokens = tokens.counts();
            rotation.scale = tokens.modulation(scale, launch.inputs[input("scale")]);
            rotation.shift = tokens.modulation(shift, launch.inputs[input("shift")]);
            rotation.epsilon = attributes().real("epsilon");
        } else {
            rotation.tokens = Tokens(x, nullptr, 0).counts();
        }
        return lrqRotate(&rotation, launch.stream);
    }

private:
    bool isNorm() const { return mPrologue == LRQ_LAYER_NORM || mPrologue == LRQ_RMS_NORM; }
    // x has the channels so many times.
    int32_t halves() const { return mPrologue == LRQ_GEGLU ? 2 : 1; }

    LrqPrologue mPrologue;
    int32_t mBlock;
};

}  // namespace

std::unique_ptr<Plugin> makeRotate(ops::Op const& op, Attributes attributes, LrqPrologue prologue) {
    return std::make_unique<RotatePlugin>(op, std::move(attributes), prologue);
}

}  // namespace lrq::trt
