// What the functions of c_api.h check alike.
#pragma once

#include <cstdint>

#include "formats.h"

namespace lrq {

inline int32_t code(Status status) {
    return static_cast<int32_t>(status);
}

inline bool inRange(int64_t dimension) {
    return dimension > 0 && dimension <= kMaxDimension;
}

inline bool isLayout(int32_t layout) {
    return layout == static_cast<int32_t>(CodesLayout::kStorage) ||
           layout == static_cast<int32_t>(CodesLayout::kWords);
}

}  // namespace lrq
