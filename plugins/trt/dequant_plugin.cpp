// TwinLogDequant, CodebookDequant and Int8Dequant: graphs/ops/weight_format.py.
#include "plugins.h"
#include "weight.h"

namespace lrq::trt {
namespace {

class DequantPlugin : public Plugin {
public:
    DequantPlugin(ops::Op const& op, Attributes given, LrqFormat format)
        : Plugin(op, std::move(given)), mWeight(attributes(), format) {}

protected:
    std::unique_ptr<Plugin> copy() const override { return std::make_unique<DequantPlugin>(*this); }

    void checkShapes(Shapes const& shapes) const override { mWeight.checkShapes(shapes, op()); }

    std::vector<OutputAxis> outputAxes(Shapes const&) const override {
        return {{kFixed, mWeight.rows()}, {kFixed, mWeight.cols()}};
    }

    int32_t launch(Launch const& launch) const override {
        char const* const levels = mWeight.levelsName();
        LrqWeight const weight =
            mWeight.at(launch.inputs[input("codes")],
                       levels == nullptr ? nullptr : launch.inputs[input(levels)]);
        auto const* scale = static_cast<float const*>(launch.inputs[input("scale")]);
        return lrqDequantize(&weight, scale, static_cast<float*>(launch.output), launch.stream);
    }

private:
    Weight mWeight;
};

}  // namespace

std::unique_ptr<Plugin> makeDequant(ops::Op const& op, Attributes attributes, LrqFormat format) {
    return std::make_unique<DequantPlugin>(op, std::move(attributes), format);
}

}  // namespace lrq::trt
