#include "shapes.h"

#include "log.h"

namespace lrq::trt {

std::string text(Dims const& shape) {
    std::string sizes;
    for (int32_t axis = 0; axis < shape.nbDims; ++axis) {
        sizes += (axis == 0 ? "" : ", ") +
                 (shape.d[axis] == kUnknown ? std::string("?") : std::to_string(shape.d[axis]));
    }
    return "(" + sizes + ")";
}

namespace {

[[noreturn]] void refuse(char const* tensor, Dims const& shape, std::string const& needed) {
    throw PluginError(std::string(tensor) + " has shape " + text(shape) + ", needed " + needed);
}

bool disagree(int64_t got, int64_t needed) {
    return got != kUnknown && needed != kUnknown && got != needed;
}

}  // namespace

void needRank(char const* tensor, Dims const& shape, int32_t rank) {
    if (shape.nbDims != rank) {
        refuse(tensor, shape, std::to_string(rank) + " axes");
    }
}

void needSize(char const* tensor, Dims const& shape, int32_t axis, int64_t needed) {
    if (disagree(shape.d[axis], needed)) {
        refuse(tensor, shape, std::to_string(needed) + " on axis " + std::to_string(axis));
    }
}

void needShape(char const* tensor, Dims const& shape, std::initializer_list<int64_t> needed) {
    Dims wanted{};
    wanted.nbDims = static_cast<int32_t>(needed.size());
    int32_t axis = 0;
    for (int64_t size : needed) {
        wanted.d[axis++] = size;
    }
    bool differs = shape.nbDims != wanted.nbDims;
    for (axis = 0; !differs && axis < wanted.nbDims; ++axis) {
        differs = disagree(shape.d[axis], wanted.d[axis]);
    }
    if (differs) {
        refuse(tensor, shape, text(wanted));
    }
}

void needBroadcast(char const* tensor, Dims const& shape, char const* onto, Dims const& target) {
    std::string const needed = "one that broadcasts to " + std::string(onto) + " " + text(target) +
                               " and has its last axis";
    if (shape.nbDims < 1 || shape.nbDims > target.nbDims) {
        refuse(tensor, shape, needed);
    }
    int32_t const missing = target.nbDims - shape.nbDims;
    for (int32_t axis = 0; axis < shape.nbDims; ++axis) {
        bool const last = axis + 1 == shape.nbDims;
        if ((last || shape.d[axis] != 1) && disagree(shape.d[axis], target.d[axis + missing])) {
            refuse(tensor, shape, needed);
        }
    }
}

Tokens::Tokens(Dims const& x, Dims const* const* others, int32_t otherCount) : mX(x) {
    int32_t const axes = x.nbDims - 1;
    for (mCut = 0; mCut <= axes; ++mCut) {
        bool fits = true;
        for (int32_t other = 0; other < otherCount; ++other) {
            fits = fits && cutFits(*others[other]);
        }
        if (fits) {
            break;
        }
    }
    if (mCut > axes) {
        std::string listed;
        for (int32_t other = 0; other < otherCount; ++other) {
            listed += (other == 0 ? "" : " and ") + text(*others[other]);
        }
        throw PluginError("tensors " + listed + " broadcast over the tokens of " + text(x) +
                          " in a way that the kernels do not read; needed: over its first axes, its"
                          " last ones before the channels, all or none of them");
    }
    for (int32_t axis = 0; axis < axes; ++axis) {
        (axis < mCut ? mCounts.outerCount : mCounts.innerCount) *= x.d[axis];
    }
}

bool Tokens::cutFits(Dims const& shape) const {
    int32_t const axes = mX.nbDims - 1;
    return rowsIn(shape, 0, mCut) != kUnknown && rowsIn(shape, mCut, axes) != kUnknown;
}

int64_t Tokens::rowsIn(Dims const& shape, int32_t first, int32_t last) const {
    int32_t const missing = mX.nbDims - shape.nbDims;
    int64_t rows = 1;
    int64_t tokens = 1;
    for (int32_t axis = first; axis < last; ++axis) {
        rows *= axis < missing ? 1 : shape.d[axis - missing];
        tokens *= mX.d[axis];
    }
    return rows == tokens || rows == 1 ? rows : kUnknown;
}

LrqModulation Tokens::modulation(Dims const& shape, void const* data) const {
    int64_t const channels = shape.d[shape.nbDims - 1];
    int64_t const outer = rowsIn(shape, 0, mCut);
    int64_t const inner = rowsIn(shape, mCut, mX.nbDims - 1);
    return {data, outer == 1 ? 0 : inner * channels, inner == 1 ? 0 : channels};
}

}  // namespace lrq::trt
