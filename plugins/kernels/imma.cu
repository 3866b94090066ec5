// The INT8 product on mma.sync, for every architecture but Hopper: one tile, type and epilogue a
// compilation, as the list in CMakeLists.txt says: LRQ_TILE_TOKENS, LRQ_TILE_ROWS, LRQ_ELEMENT,
// LRQ_GATED, and LRQ_LAUNCHER, the name of the function that this unit defines.
//
// Sums are exact in INT32; the epilogue multiplies and adds in float, in the order of
// graphs/ops/token_product.py, and is compiled without contraction.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include "imma_gate.h"
#include "product.h"

namespace lrq {
namespace {

using namespace cute;
namespace visitor = cutlass::epilogue::threadblock;

constexpr int kTileTokens = LRQ_TILE_TOKENS;
constexpr int kTileRows = LRQ_TILE_ROWS;
constexpr bool kGated = LRQ_GATED;
using Element = LRQ_ELEMENT;

// 64 columns a stage: (128 + 256) * 64 * 3 = 72 KiB of shared memory for the largest tile; the
// smallest of our architectures has 99.
constexpr int kTileCols = 64;
constexpr int kStages = 3;
constexpr int kWarpTokens = kTileTokens == 64 ? 32 : 64;

using Tile = cutlass::gemm::GemmShape<kTileTokens, kTileRows, kTileCols>;
using Warp = cutlass::gemm::GemmShape<kWarpTokens, 64, kTileCols>;
using Instruction = cutlass::gemm::GemmShape<16, 8, 32>;

constexpr int kAlignment = 16;  // INT8 elements of a 16-byte access
constexpr int kOutputAlignment = 16 / sizeof(Element);
constexpr int kEpilogueStages = 1;

using Threads = visitor::OutputTileThreadLayout<Tile, Warp, Element, kOutputAlignment,
                                                kEpilogueStages>;
using OutputStride = Stride<int64_t, _1, int64_t>;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
template <template <class> class Operation, class Output>
using Compute = visitor::VisitorCompute<Operation, Output, float, kRound>;

using TokenScale = visitor::VisitorColBroadcast<Threads, float, Stride<_1, _0, int64_t>>;
using RowScale = visitor::VisitorRowBroadcast<Threads, float, Stride<_0, _1, int64_t>>;
using Bias = visitor::VisitorRowBroadcast<Threads, float, Stride<_0, _1, int64_t>>;

using InTokens = visitor::Sm80EVT<Compute<cutlass::multiplies, float>, visitor::VisitorAccFetch,
                                  TokenScale>;
using InRows = visitor::Sm80EVT<Compute<cutlass::multiplies, float>, InTokens, RowScale>;
template <class Output>
using Biased = visitor::Sm80EVT<Compute<cutlass::plus, Output>, InRows, Bias>;

using Residual = visitor::VisitorAuxLoad<Threads, Element, OutputStride>;
using GatedProduct = visitor::Sm80EVT<Compute<cutlass::multiplies, float>, Biased<float>,
                                      ImmaGate<Threads, Element>>;
using GatedSum = visitor::Sm80EVT<Compute<cutlass::plus, Element>, GatedProduct, Residual>;

using Sum = std::conditional_t<kGated, GatedSum, Biased<Element>>;
using Store = visitor::VisitorAuxStore<Threads, Element, kRound, OutputStride>;
using Tree = visitor::Sm80EVT<Store, Sum>;

using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    int8_t, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kAlignment, int8_t,
    cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, kAlignment, Element,
    cutlass::layout::RowMajor, kOutputAlignment, int32_t, float, cutlass::arch::OpClassTensorOp,
    cutlass::arch::Sm80, Tile, Warp, Instruction, Tree,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
    cutlass::arch::OpMultiplyAddSaturate, kEpilogueStages>::GemmKernel;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

typename Biased<float>::Arguments biased(Product const& product) {
    typename InTokens::Arguments const inTokens{{}, {product.tokenScales}, {}};
    typename InRows::Arguments const inRows{inTokens, {product.rowScales}, {}};
    return {inRows, {product.bias}, {}};
}

template <class AnySum>
typename AnySum::Arguments sumOf(Product const& product) {
    if constexpr (std::is_same_v<AnySum, GatedSum>) {
        typename GatedProduct::Arguments const gated{biased(product), {product.gate}, {}};
        Element* const residual = static_cast<Element*>(const_cast<void*>(product.residual));
        return {gated, {residual, Element(0), {product.stride, _1{}, 0}}, {}};
    } else {
        return biased(product);
    }
}

}  // namespace

bool LRQ_LAUNCHER(Product const& product, Device const&, cudaStream_t stream) {
    Element* const y = static_cast<Element*>(product.y);
    typename Tree::Arguments const tree{sumOf<Sum>(product), {y, {product.stride, _1{}, 0}}};
    typename Gemm::Arguments const arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, {product.tokens, product.rows, product.cols}, 1,
        tree, product.quantized, product.weight, nullptr, nullptr, 0, 0, 0, 0, product.cols,
        product.cols, product.stride, product.stride);
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess ||
        Gemm::get_workspace_size(arguments) != 0) {
        return false;
    }
    Gemm gemm;
    return gemm.initialize(arguments, nullptr, stream) == cutlass::Status::kSuccess &&
           gemm.run(stream) == cutlass::Status::kSuccess;
}

}  // namespace lrq
