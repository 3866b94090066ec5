// How a product is cut up: which tile, how many rows are decoded at a time, what lies where in the
// workspace. Sizes in, numbers out: no CUDA, so that a CPU test holds all of it.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace lrq {

// A tile of the tensor cores. `speed` is what one processor reaches on it relative to the largest
// tile, whose operands are fetched least often: assumed until tools/bench_kernels has measured it.
struct TileShape {
    int32_t tactic;
    int32_t tokens;
    int32_t rows;
    double speed;
};

constexpr TileShape kTileShapes[] = {
    {LRQ_TILE_128_256, 128, 256, 1.00}, {LRQ_TILE_128_128, 128, 128, 0.94},
    {LRQ_TILE_64_256, 64, 256, 0.92},   {LRQ_TILE_64_192, 64, 192, 0.88},
    {LRQ_TILE_64_128, 64, 128, 0.80},
};

constexpr TileShape const* tileShapeOf(int32_t tactic) {
    for (TileShape const& shape : kTileShapes) {
        if (shape.tactic == tactic) {
            return &shape;
        }
    }
    return nullptr;
}

constexpr int64_t divideUp(int64_t count, int64_t size) {
    return (count + size - 1) / size;
}

// The same, without a remainder.
constexpr int64_t roundUp(int64_t count, int64_t multiple) {
    return divideUp(count, multiple) * multiple;
}

// Waves of tiles over all processors; the last one counts whole. On Hopper two tiles of tokens form
// a cluster.
constexpr int64_t wavesOf(TileShape const& tile, int64_t tokens, int64_t rows, int32_t processors,
                          int32_t cluster) {
    int64_t const tokenTiles = roundUp(divideUp(tokens, tile.tokens), cluster);
    return divideUp(tokenTiles * divideUp(rows, tile.rows), processors);
}

// The share of the processors' time that goes into the product itself, 0..1.
constexpr double waveEfficiency(TileShape const& tile, int64_t tokens, int64_t rows,
                                int32_t processors, int32_t cluster) {
    int64_t const waves = wavesOf(tile, tokens, rows, processors, cluster);
    double const computed = static_cast<double>(waves) * processors * tile.tokens * tile.rows;
    return static_cast<double>(tokens) * static_cast<double>(rows) / computed;
}

// The tile that finishes first among those of `available`, one bit for each tactic; LRQ_AUTO if
// there is none.
constexpr int32_t chooseTile(
    uint32_t available, int64_t tokens, int64_t rows, int32_t processors, int32_t cluster) {
    int32_t chosen = LRQ_AUTO;
    double best = 0.0;
    for (TileShape const& tile : kTileShapes) {
        if ((available >> tile.tactic & 1) == 0) {
            continue;
        }
        double const rate =
            tile.speed * waveEfficiency(tile, tokens, rows, processors, cluster);
        if (rate > best) {
            best = rate;
            chosen = tile.tactic;
        }
    }
    return chosen;
}

// Rows of a weight that are decoded together: what stays in L2 between the decode that writes it
// and the product that reads it. Shares of a weight are alike and whole tiles.
#if !defined(LRQ_MOST_DECODED_BYTES)  // tests cut smaller weights
#define LRQ_MOST_DECODED_BYTES (24 * 1024 * 1024)
#endif
constexpr int64_t kMostDecodedBytes = LRQ_MOST_DECODED_BYTES;
constexpr int64_t kShareOfRows = 256;

constexpr int64_t rowsDecodedAtOnce(int64_t rows, int64_t cols) {
    int64_t const fitting = kMostDecodedBytes / cols / kShareOfRows * kShareOfRows;
    int64_t const most = fitting > 0 ? fitting : kShareOfRows;
    if (rows <= most) {
        return rows;
    }
    return roundUp(divideUp(rows, divideUp(rows, most)), kShareOfRows);
}

// Byte offsets; a part that a call does not need is empty.
struct WorkspacePlan {
    int64_t quantized;    // INT8 (tokens, cols)
    int64_t tokenScales;  // float (tokens,)
    int64_t decoded;      // INT8 (rowsDecodedAtOnce, cols)
    int64_t bytes;
};

constexpr int64_t kWorkspaceAlignment = 256;

constexpr WorkspacePlan planWorkspace(
    int64_t tokens, int64_t rows, int64_t cols, bool quantizes, bool decodes) {
    int64_t const codes = quantizes ? roundUp(tokens * cols, kWorkspaceAlignment) : 0;
    int64_t const scales = quantizes ? roundUp(tokens * 4, kWorkspaceAlignment) : 0;
    int64_t const weight =
        decodes ? roundUp(rowsDecodedAtOnce(rows, cols) * cols, kWorkspaceAlignment) : 0;
    return {0, codes, codes + scales, codes + scales + weight};
}

}  // namespace lrq
