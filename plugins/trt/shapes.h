// Checks of tensor sizes that say which tensor, what it has and what it needs, and how x's axes
// become tokens.
#pragma once

#include <cstdint>
#include <string>

#include "../kernels/kernels.h"
#include "NvInfer.h"

namespace lrq::trt {

using nvinfer1::Dims;

constexpr int64_t kUnknown = -1;  // a size that is not known before run time

std::string text(Dims const& shape);

// Each throws PluginError where known sizes disagree.
void needRank(char const* tensor, Dims const& shape, int32_t rank);
void needSize(char const* tensor, Dims const& shape, int32_t axis, int64_t needed);
void needShape(char const* tensor, Dims const& shape, std::initializer_list<int64_t> needed);
// `shape` broadcasts to `target`, whose name is `onto`, and ends in its last axis.
void needBroadcast(char const* tensor, Dims const& shape, char const* onto, Dims const& target);

// The tokens of x (..., channels) as outer * inner, cut between two of its axes so that each of the
// other tensors, which broadcast to x, has one stride for the outer and one for the inner tokens.
// All sizes are known.
class Tokens {
public:
    // x without its last axis; `others` may have a last axis of another size. Throws PluginError
    // where no cut will do: a tensor that skips an axis between two that it has.
    Tokens(Dims const& x, Dims const* const* others, int32_t otherCount);

    LrqTokens counts() const { return mCounts; }
    int64_t count() const { return mCounts.outerCount * mCounts.innerCount; }

    // The strides of one of the others, in elements.
    LrqModulation modulation(Dims const& shape, void const* data) const;

private:
    bool cutFits(Dims const& shape) const;
    // Rows that `shape` has in x's axes [first, last): all of x's, or 1; kUnknown if it is neither.
    int64_t rowsIn(Dims const& shape, int32_t first, int32_t last) const;

    Dims mX;
    int32_t mCut{0};  // axes before it are outer
    LrqTokens mCounts{1, 1};
};

}  // namespace lrq::trt
