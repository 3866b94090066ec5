// A node of an Ampere epilogue tree: gate[token, row], where the token picks a row of channels by
// its place in (outer, inner). CUTLASS's own loads know one stride for all tokens.
#pragma once

// visitors.hpp does not stand alone: behind what includes the rest of CUTLASS.
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "product.h"

namespace lrq {

template <class ThreadMap, class Element>
struct ImmaGate {
    struct SharedStorage {};

    struct Arguments {
        TokenRows rows;
    };

    using Params = Arguments;

    template <class ProblemShape>
    static constexpr Params to_underlying_arguments(
        ProblemShape const&, Arguments const& arguments, void*) {
        return arguments;
    }

    template <class ProblemShape>
    static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
        return 0;
    }

    CUTLASS_HOST_DEVICE ImmaGate() {}

    CUTLASS_HOST_DEVICE ImmaGate(Params const& params, SharedStorage const&) : params_(&params) {}

    Params const* params_;

    // Coordinates: (vector, column fragment, row fragment, step) -> (token, row, 0)
    template <class Coordinates, class ProblemShape>
    struct Callbacks : cutlass::epilogue::threadblock::EmptyCallbacks {
        CUTLASS_DEVICE Callbacks(
            Coordinates&& coordinates, ProblemShape shape, Params const* params)
            : coordinates_(cute::forward<Coordinates>(coordinates)),
              shape_(shape),
              params_(params) {}

        Coordinates coordinates_;
        ProblemShape shape_;
        Params const* params_;

        template <class Accumulator, int kFragment>
        CUTLASS_DEVICE cutlass::Array<float, kFragment> visit(
            int step, int rowFragment, int columnFragment, int,
            cutlass::Array<Accumulator, kFragment> const&) {
            TokenRows const& rowsOfGate = params_->rows;
            cutlass::NumericConverter<float, Element> toFloat;
            cutlass::Array<float, kFragment> gate;
            CUTLASS_PRAGMA_UNROLL
            for (int index = 0; index < kFragment; ++index) {
                auto const coordinate = coordinates_(index, columnFragment, rowFragment, step);
                gate[index] = 0.0f;
                if (cute::elem_less(coordinate, shape_)) {
                    int32_t const token = cute::get<0>(coordinate);
                    int32_t const row = cute::get<1>(coordinate);
                    gate[index] = toFloat(rowsOfGate.rowOf<Element>(token)[row]);
                }
            }
            return gate;
        }
    };

    template <class ProblemShape>
    CUTLASS_DEVICE auto get_callbacks(
        cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
        auto coordinates = cute::group_modes<3, 6>(
            ThreadMap::partition(cute::make_identity_tensor(shape), thread, tile));
        return Callbacks<decltype(coordinates), ProblemShape>(
            cute::move(coordinates), shape, params_);
    }
};

}  // namespace lrq
