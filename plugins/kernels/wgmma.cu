// The INT8 product on Hopper's wgmma: one tile, type and epilogue a compilation, as the list in
// CMakeLists.txt says: LRQ_TILE_TOKENS, LRQ_TILE_ROWS, LRQ_ELEMENT, LRQ_GATED, and LRQ_LAUNCHER,
// the name of the function that this unit defines.
//
// Activations (tokens, cols) and weights (rows, cols) both have the contracted dimension innermost,
// which is all that IGMMA takes. Sums are exact in INT32; the epilogue multiplies and adds in
// float, in the order of graphs/ops/token_product.py, and is compiled without contraction.
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "product.h"
#include "wgmma_gate.h"

namespace lrq {
namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

constexpr int kTileTokens = LRQ_TILE_TOKENS;
constexpr int kTileRows = LRQ_TILE_ROWS;
constexpr bool kGated = LRQ_GATED;
using Element = LRQ_ELEMENT;

// 128 tokens x 256 rows need the registers of two warp groups; smaller tiles take turns, so that
// the epilogue of one hides behind the products of the other.
constexpr bool kCooperative = kTileTokens == 128 && kTileRows == 256;

using TileShape = Shape<Int<kTileTokens>, Int<kTileRows>, _128>;
// Two tiles of tokens that share their rows of the weight, which is then fetched once.
using ClusterShape = Shape<_2, _1, _1>;

using Schedule =
    std::conditional_t<kCooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                       cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
using EpilogueSchedule =
    std::conditional_t<kCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                       cutlass::epilogue::TmaWarpSpecialized>;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
template <template <class> class Operation, class Output>
using Compute = fusion::Sm90Compute<Operation, Output, float, kRound>;

using TokenScale = fusion::Sm90ColBroadcast<0, TileShape, float, float>;
using RowScale = fusion::Sm90RowBroadcast<0, TileShape, float, float>;
using Bias = fusion::Sm90RowBroadcast<0, TileShape, float, float>;

using InTokens =
    fusion::Sm90EVT<Compute<cutlass::multiplies, float>, fusion::Sm90AccFetch, TokenScale>;
using InRows = fusion::Sm90EVT<Compute<cutlass::multiplies, float>, InTokens, RowScale>;
template <class Output>
using Biased = fusion::Sm90EVT<Compute<cutlass::plus, Output>, InRows, Bias>;

using Residual = fusion::Sm90SrcFetch<Element>;
using GatedProduct =
    fusion::Sm90EVT<Compute<cutlass::multiplies, float>, Biased<float>, WgmmaGate<Element>>;
using GatedSum = fusion::Sm90EVT<Compute<cutlass::plus, Element>, GatedProduct, Residual>;

using Tree = std::conditional_t<kGated, GatedSum, Biased<Element>>;

constexpr int kAlignment = 16;  // INT8 elements of a 16-byte access
constexpr int kOutputAlignment = 16 / sizeof(Element);
using Source = std::conditional_t<kGated, Element, void>;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, Source, RowMajor,
    kOutputAlignment, Element, RowMajor, kOutputAlignment, EpilogueSchedule, Tree>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, RowMajor, kAlignment, int8_t,
    ColumnMajor, kAlignment, int32_t, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    Schedule>::CollectiveOp;

using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                    cutlass::gemm::PersistentScheduler>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

typename Biased<float>::Arguments biased(Product const& product) {
    typename InTokens::Arguments const inTokens{{}, {product.tokenScales}, {}};
    typename InRows::Arguments const inRows{inTokens, {product.rowScales}, {}};
    return {inRows, {product.bias}, {}};
}

template <class AnyTree>
typename AnyTree::Arguments treeOf(Product const& product) {
    if constexpr (std::is_same_v<AnyTree, GatedSum>) {
        typename GatedProduct::Arguments const gated{biased(product), {product.gate}, {}};
        return {gated, {}, {}};
    } else {
        return biased(product);
    }
}

}  // namespace

bool LRQ_LAUNCHER(Product const& product, Device const& device, cudaStream_t stream) {
    using Stride = Stride<int64_t, _1, int64_t>;
    Stride const packed{product.cols, _1{}, 0};
    Stride const output{product.stride, _1{}, 0};

    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {product.tokens, product.rows, product.cols, 1};
    arguments.mainloop.ptr_A = product.quantized;
    arguments.mainloop.dA = packed;
    arguments.mainloop.ptr_B = product.weight;
    arguments.mainloop.dB = packed;
    arguments.epilogue.thread = treeOf<Tree>(product);
    if constexpr (kGated) {
        arguments.epilogue.ptr_C = static_cast<Element const*>(product.residual);
    }
    arguments.epilogue.dC = output;
    arguments.epilogue.ptr_D = static_cast<Element*>(product.y);
    arguments.epilogue.dD = output;
    arguments.hw_info.sm_count = device.processors;

    if (Gemm::get_workspace_size(arguments) != 0) {
        return false;
    }
    Gemm gemm;
    return gemm.initialize(arguments, nullptr, stream) == cutlass::Status::kSuccess &&
           gemm.run(stream) == cutlass::Status::kSuccess;
}

}  // namespace lrq
