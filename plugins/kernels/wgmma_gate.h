// A node of a Hopper epilogue tree: gate[token, row], where the token picks a row of channels by
// its place in (outer, inner). CUTLASS's own loads know one stride for all tokens.
#pragma once

#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "product.h"

namespace lrq {

template <class Element>
struct WgmmaGate {
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
    static bool can_implement(ProblemShape const&, Arguments const&) {
        return true;
    }

    template <class ProblemShape>
    static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
        return 0;
    }

    template <class ProblemShape>
    static cutlass::Status initialize_workspace(
        ProblemShape const&, Arguments const&, void*, cudaStream_t,
        cutlass::CudaHostAdapter* = nullptr) {
        return cutlass::Status::kSuccess;
    }

    CUTLASS_HOST_DEVICE WgmmaGate() {}

    CUTLASS_HOST_DEVICE WgmmaGate(Params const& params, SharedStorage const&) : params_(&params) {}

    Params const* params_;

    CUTLASS_DEVICE bool is_producer_load_needed() const {
        return false;
    }

    CUTLASS_DEVICE bool is_C_load_needed() const {
        return false;
    }

    template <class... Args>
    CUTLASS_DEVICE auto get_producer_load_callbacks(
        cutlass::epilogue::fusion::ProducerLoadArgs<Args...> const&) {
        return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
    }

    // Coordinates: (COPY, COPY_M, COPY_N, EPILOGUE_M, EPILOGUE_N) -> (token, row, 0)
    template <class Coordinates>
    struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
        CUTLASS_DEVICE Callbacks(
            Coordinates&& coordinates, int32_t tokens, int32_t rows, Params const* params)
            : coordinates_(cute::forward<Coordinates>(coordinates)),
              tokens_(tokens),
              rows_(rows),
              params_(params) {}

        Coordinates coordinates_;
        int32_t tokens_;
        int32_t rows_;
        Params const* params_;

        template <class Accumulator, int kFragment>
        CUTLASS_DEVICE cutlass::Array<float, kFragment> visit(
            cutlass::Array<Accumulator, kFragment> const&, int vector, int epilogueM,
            int epilogueN) {
            auto const all = coordinates_(cute::_, cute::_, cute::_, epilogueM, epilogueN);
            TokenRows const& rowsOfGate = params_->rows;
            cutlass::NumericConverter<float, Element> toFloat;
            cutlass::Array<float, kFragment> gate;
            CUTLASS_PRAGMA_UNROLL
            for (int index = 0; index < kFragment; ++index) {
                auto const coordinate = all(vector * kFragment + index);
                int32_t const token = cute::get<0>(coordinate);
                int32_t const row = cute::get<1>(coordinate);
                gate[index] = 0.0f;
                if (token < tokens_ && row < rows_) {
                    gate[index] = toFloat(rowsOfGate.rowOf<Element>(token)[row]);
                }
            }
            return gate;
        }
    };

    template <bool kReferenceSource, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(
        cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
        auto const [tokens, rows, cols, batch] = args.problem_shape_mnkl;
        auto identity = cute::make_identity_tensor(cute::make_shape(tokens, rows, batch));
        auto coordinates = cutlass::epilogue::fusion::sm90_partition_for_epilogue<kReferenceSource>(
            identity, args.tile_shape_mnk, args.tile_coord_mnkl, args.epi_tile, args.tiled_copy,
            args.thread_idx);
        return Callbacks<decltype(coordinates)>(cute::move(coordinates), tokens, rows, params_);
    }
};

}  // namespace lrq
