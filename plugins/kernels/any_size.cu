// One thread an output, tiles of 16 tokens x 16 rows x 64 columns in shared memory; columns beyond
// the last are zeros there. Nothing is assumed of sizes or of where a row begins, so it serves odd
// widths; where tensor cores can be used they are many times faster.
#include "any_size.h"

#include "epilogue.h"
#include "kernels.h"

namespace lrq {
namespace {

constexpr int32_t kTile = 16;       // tokens, and rows
constexpr int32_t kTileCols = 64;
constexpr int32_t kThreads = kTile * kTile;
constexpr int32_t kTileWords = kTileCols / 4;

// tile (kTile, kTileCols) of values (count, cols) from (first, col) on; words are padded by one so
// that threads of neighbouring rows read from different banks.
struct TileOfCodes {
    uint32_t words[kTile][kTileWords + 1];

    __device__ void load(int8_t const* values, int64_t first, int64_t count, int64_t col,
                         int64_t cols) {
        for (int32_t index = static_cast<int32_t>(threadIdx.x); index < kTile * kTileWords;
             index += kThreads) {
            int32_t const row = index / kTileWords;
            int32_t const word = index % kTileWords;
            uint32_t packed = 0;
            for (int32_t byte = 0; byte < 4; ++byte) {
                int64_t const at = col + 4 * word + byte;
                if (first + row < count && at < cols) {
                    int8_t const value = values[(first + row) * cols + at];
                    packed |= static_cast<uint32_t>(static_cast<uint8_t>(value)) << (8 * byte);
                }
            }
            words[row][word] = packed;
        }
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads) multiplyOne(Product const product, int64_t rowTiles) {
    __shared__ TileOfCodes activations;
    __shared__ TileOfCodes weights;
    int64_t const firstToken = static_cast<int64_t>(blockIdx.x) / rowTiles * kTile;
    int64_t const firstRow = static_cast<int64_t>(blockIdx.x) % rowTiles * kTile;
    int32_t const ownToken = static_cast<int32_t>(threadIdx.x) / kTile;
    int32_t const ownRow = static_cast<int32_t>(threadIdx.x) % kTile;
    int32_t sum = 0;
    for (int64_t col = 0; col < product.cols; col += kTileCols) {
        activations.load(product.quantized, firstToken, product.tokens, col, product.cols);
        weights.load(product.weight, firstRow, product.rows, col, product.cols);
        synchronizeBlock();
        for (int32_t word = 0; word < kTileWords; ++word) {
            sum = dot4(activations.words[ownToken][word], weights.words[ownRow][word], sum);
        }
        synchronizeBlock();
    }
    if (firstToken + ownToken < product.tokens && firstRow + ownRow < product.rows) {
        storeSum<T>(product, sum, firstToken + ownToken, firstRow + ownRow);
    }
}

}  // namespace

bool multiplyAnySize(Product const& product, int32_t type, cudaStream_t stream) {
    int64_t const tokenTiles = (product.tokens + kTile - 1) / kTile;
    int64_t const rowTiles = (product.rows + kTile - 1) / kTile;
    Grid const grid{tokenTiles * rowTiles, kThreads};
    switch (type) {
        case LRQ_FLOAT:
            return launch(multiplyOne<float>, grid, stream, product, rowTiles);
        case LRQ_HALF:
            return launch(multiplyOne<Half>, grid, stream, product, rowTiles);
        default:
            return launch(multiplyOne<Bfloat16>, grid, stream, product, rowTiles);
    }
}

}  // namespace lrq
