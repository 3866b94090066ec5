// What the library exports: every creator, to whoever loads it by IPluginRegistry::loadLibrary.
#include <iterator>
#include <vector>

#include "creator.h"

namespace lrq::trt {
namespace {

Creator rotate(ops::Op const& op, LrqPrologue prologue) {
    return {op, [&op, prologue](Attributes given) {
                return makeRotate(op, std::move(given), prologue);
            }};
}

Creator dequant(ops::Op const& op, LrqFormat format) {
    return {op,
            [&op, format](Attributes given) { return makeDequant(op, std::move(given), format); }};
}

Creator linear(ops::Op const& op, LrqFormat format) {
    return {op,
            [&op, format](Attributes given) { return makeLinear(op, std::move(given), format); }};
}

Creator allCreators[] = {
    rotate(ops::hadamard_rotate::kOp, LRQ_NO_PROLOGUE),
    rotate(ops::layer_norm_rotate::kOp, LRQ_LAYER_NORM),
    rotate(ops::rms_norm_rotate::kOp, LRQ_RMS_NORM),
    rotate(ops::gelu_rotate::kOp, LRQ_GELU),
    rotate(ops::gelu_tanh_rotate::kOp, LRQ_GELU_TANH),
    rotate(ops::silu_rotate::kOp, LRQ_SILU),
    rotate(ops::geglu_rotate::kOp, LRQ_GEGLU),
    dequant(ops::twin_log_dequant::kOp, LRQ_TWIN_LOG),
    dequant(ops::codebook_dequant::kOp, LRQ_CODEBOOK),
    dequant(ops::int8_dequant::kOp, LRQ_INT8),
    linear(ops::twin_log_linear::kOp, LRQ_TWIN_LOG),
    linear(ops::codebook_linear::kOp, LRQ_CODEBOOK),
    linear(ops::int8_linear::kOp, LRQ_INT8),
    linear(ops::twin_log_linear_residual::kOp, LRQ_TWIN_LOG),
    linear(ops::codebook_linear_residual::kOp, LRQ_CODEBOOK),
    linear(ops::int8_linear_residual::kOp, LRQ_INT8),
};
static_assert(std::size(allCreators) == std::size(ops::kOps),
              "an op of graphs/ops has no plugin: give it a line above");

}  // namespace
}  // namespace lrq::trt

extern "C" LRQ_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static std::vector<nvinfer1::IPluginCreatorInterface*> const listed = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> pointers;
        for (lrq::trt::Creator& creator : lrq::trt::allCreators) {
            pointers.push_back(&creator);
        }
        return pointers;
    }();
    count = static_cast<int32_t>(listed.size());
    return listed.data();
}

extern "C" LRQ_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    lrq::trt::setFinder(finder);
}
