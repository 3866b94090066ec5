// The closed list of products on tensor cores that this library was compiled with.
#pragma once

#include "product.h"

namespace lrq {

// Hopper has an instruction of its own; everything else multiplies with mma.sync.
enum class Family : int32_t { kImma, kWgmma };

constexpr Family familyOf(Device const& device) {
    return device.architecture == 90 ? Family::kWgmma : Family::kImma;
}

// Tiles of tokens that form a cluster, see wgmma.cu.
constexpr int32_t clusterOf(Family family) {
    return family == Family::kWgmma ? 2 : 1;
}

// The launcher for a tactic, an LrqType and with or without gate and residual; null if there is
// none.
ProductLauncher findLauncher(Family family, int32_t tactic, int32_t type, bool isGated);

// One bit for each tactic that findLauncher finds.
uint32_t availableTactics(Family family, int32_t type, bool isGated);

// Whether there is any; there is none where the kernels run without a GPU.
bool hasInstantiations();

}  // namespace lrq
