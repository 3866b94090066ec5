// How the values of a token change hands through shared memory, from threads that hold columns to
// threads that hold runs. A token is blocks of `parts` parts of 2^partLog channels.
#pragma once

#include "token_runs.h"

namespace lrq {

constexpr int32_t kBanks = 32;  // of shared memory, 4 bytes each

LRQ_HOST_DEVICE constexpr int32_t padded(int32_t channel) {
    return channel + channel / 32 * 4;
}

// Where a channel lies, in floats. Four floats are left out after every 32, and after every part of
// 16: eight lanes that read a vector of eight neighbouring runs of a token then meet all banks. Blocks
// of which half a warp writes a row each begin half the banks apart, if they are `apart`. Columns 8
// wide and lanes of two tokens meet two by two, lanes of smaller parts more.
struct ExchangePlan {
    int32_t parts;       // of a block
    int32_t partLog;     // log2 of the channels of a part
    int32_t partPitch;   // from one part to the next
    int32_t blockPitch;  // from one block to the next

    LRQ_HOST_DEVICE constexpr ExchangePlan(int32_t parts, int32_t partLog, bool apart)
        : parts(parts),
          partLog(partLog),
          partPitch(partLog == 4 ? kRun + 4 : padded(1 << partLog)),
          blockPitch(parts * partPitch) {
        if (apart && partLog == 4 && blockPitch % kBanks == 0) {
            blockPitch += kBanks / 2;
        }
    }

    // Bytes of a token.
    constexpr int64_t bytes(int32_t channels) const {
        return 4 * static_cast<int64_t>((channels >> partLog) / parts) * blockPitch;
    }

    __device__ int32_t offsetOf(int32_t block, int32_t part, int32_t place) const {
        return block * blockPitch + part * partPitch + padded(place);
    }

    // Where the run that begins at `channel` lies, which is whole.
    __device__ int32_t offsetOfRun(int32_t channel) const {
        int32_t const part = channel >> partLog;  // of the token
        int32_t const within = channel - (part << partLog);
        int32_t const gaps = part / parts * (blockPitch - parts * partPitch);
        return part * partPitch + gaps + padded(within);
    }
};

}  // namespace lrq
