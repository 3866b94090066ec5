#include "instantiations.h"

#include "plan.h"

// instantiations.inc is written by CMake, which compiles one unit for each of its lines:
// LRQ_INSTANTIATION(family, tokens of a tile, rows of a tile, LrqType, gated, launcher)

namespace lrq {

#define LRQ_INSTANTIATION(family, tokens, rows, type, gated, launcher) \
    bool launcher(Product const&, Device const&, cudaStream_t);
#include "instantiations.inc"
#undef LRQ_INSTANTIATION

namespace {

struct Instantiation {
    Family family;
    int32_t tokens;
    int32_t rows;
    int32_t type;
    bool isGated;
    ProductLauncher launcher;
};

constexpr Instantiation kInstantiations[] = {
#define LRQ_INSTANTIATION(family, tokens, rows, type, gated, launcher) \
    {Family::family, tokens, rows, type, gated, launcher},
#include "instantiations.inc"
#undef LRQ_INSTANTIATION
    {Family::kImma, 0, 0, 0, false, nullptr},  // the end: the list may be empty
};

}  // namespace

ProductLauncher findLauncher(Family family, int32_t tactic, int32_t type, bool isGated) {
    TileShape const* const shape = tileShapeOf(tactic);
    for (Instantiation const& one : kInstantiations) {
        if (shape != nullptr && one.family == family && one.tokens == shape->tokens &&
            one.rows == shape->rows && one.type == type && one.isGated == isGated) {
            return one.launcher;
        }
    }
    return nullptr;
}

uint32_t availableTactics(Family family, int32_t type, bool isGated) {
    uint32_t available = 0;
    for (TileShape const& shape : kTileShapes) {
        bool const isThere = findLauncher(family, shape.tactic, type, isGated) != nullptr;
        available |= static_cast<uint32_t>(isThere) << shape.tactic;
    }
    return available;
}

bool hasInstantiations() {
    return sizeof(kInstantiations) > sizeof(Instantiation);  // more than the end
}

}  // namespace lrq
