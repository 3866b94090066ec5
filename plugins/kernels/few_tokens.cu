// Up to 64 tokens: weights are read from memory once, as codes, and decoded in registers into the
// fragments of the tensor cores; there is no shared memory in the way of weights.
//
// The 16 rows of the weight are the 16 rows of mma.m16n8k32, 8 tokens its columns. Which of the 32
// contracted columns a lane holds is free as long as weights and activations agree: the four lanes
// of a row take runs of 32, 64 or 128 neighbouring columns, so that a run of codes is one 16-byte
// load (three for 3 bits), and the bytes that decode gives, in order, are the words of the
// fragment.
//
// A block has eight warps: one for each 16 rows and 8 tokens x 16 rows of the tile, the rest of
// them split the columns and add up their sums at the end. A tile has 16 rows for every 8 tokens:
// the activations that a block reads from L2 are then about as many bytes as its codes.
#include "few_tokens.h"

#include <cstring>

#include "../core/table_decode.h"
#include "epilogue.h"
#include "kernels.h"
#include "level.h"

namespace lrq {
namespace {

constexpr int32_t kWarp = 32;
constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = kWarp * kWarps;
constexpr int32_t kMmaRows = 16;
constexpr int32_t kMmaTokens = 8;
constexpr int32_t kQuads = 4;      // lanes of a row
constexpr int32_t kPieceCols = 32;  // codes that are decoded at once: `bits` words of them
constexpr int64_t kMostTableBytes = 96 * 1024;

template <int32_t kBits>
struct RunOf {
    static constexpr int32_t kVectors = kBits == 3 ? 3 : 1;
    static constexpr int32_t kCols = kVectors * 128 / kBits;  // 32, 128, 64 for 4, 3, 2 bits
    static constexpr int32_t kPieces = kCols / kPieceCols;
    static_assert(kPieces * kBits * kWordBytes == kVectors * 16, "whole pieces");
    uint32_t words[kPieces][kBits];

    __device__ void load(uint8_t const* row, int64_t run) {
        uint4 vectors[kVectors];
#pragma unroll
        for (int32_t vector = 0; vector < kVectors; ++vector) {
            vectors[vector] =
                loadOnce(reinterpret_cast<uint4 const*>(row) + run * kVectors + vector);
        }
        memcpy(words, vectors, sizeof(words));
    }
};

struct Piece {
    uint32_t levels[kPieceCols / 4];
};

template <int32_t kBits>
__device__ inline Piece decodePiece(
    LookupTable<kBits> const& table, uint32_t const (&words)[kBits]) {
    Piece piece;
    constexpr int32_t kUnitWords = Unit<kBits>::kWords;
    constexpr int32_t kUnitLevels = Unit<kBits>::kCodes / 4;
#pragma unroll
    for (int32_t unit = 0; unit < kBits / kUnitWords; ++unit) {
        Unit<kBits> codes;
        memcpy(&codes, words + unit * kUnitWords, sizeof(codes));
        decodeUnit(table, codes, piece.levels + unit * kUnitLevels);
    }
    return piece;
}

// Tiles of 8 tokens, and how the eight warps share the work of a block.
template <int32_t kTokenTiles>
struct Share {
    static constexpr int32_t kRowWarps = kTokenTiles;
    static constexpr int32_t kColWarps = kWarps / kTokenTiles;
    static constexpr int32_t kRows = kMmaRows * kRowWarps;
    static constexpr int32_t kTokens = kMmaTokens * kTokenTiles;
    static constexpr int32_t kSums = kColWarps * kRows * kTokens;
};

template <int32_t kBits, int32_t kTokenTiles>
struct Accumulator {
    using Run = RunOf<kBits>;
    int32_t sums[kTokenTiles][4];

    // Adds the runs of two rows times the same columns, from `col` on, of every token. A group size
    // of 0 says that all columns have the first table.
    __device__ void add(Run const& low, Run const& high, LookupTable<kBits> const* lowTables,
                        LookupTable<kBits> const* highTables, int32_t col, int32_t groupSize,
                        int8_t const* const (&activations)[kTokenTiles]) {
#pragma unroll
        for (int32_t index = 0; index < Run::kPieces; ++index) {
            int32_t const start = col + index * kPieceCols;
            int32_t const group = groupSize == 0 ? 0 : start / groupSize;
            Piece const lowPiece = decodePiece<kBits>(lowTables[group], low.words[index]);
            Piece const highPiece = decodePiece<kBits>(highTables[group], high.words[index]);
            addPiece(lowPiece, highPiece, start, activations);
        }
    }

    __device__ void addPiece(Piece const& low, Piece const& high, int32_t col,
                             int8_t const* const (&activations)[kTokenTiles]) {
#pragma unroll
        for (int32_t tile = 0; tile < kTokenTiles; ++tile) {
            uint4 const* const vectors = reinterpret_cast<uint4 const*>(activations[tile] + col);
            uint4 const first = vectors[0];
            uint4 const second = vectors[1];
            uint32_t tokens[kPieceCols / 4];
            memcpy(tokens, &first, sizeof(first));
            memcpy(tokens + 4, &second, sizeof(second));
#pragma unroll
            for (int32_t step = 0; step < kPieceCols / 8; ++step) {
                uint32_t const left[4] = {low.levels[2 * step], high.levels[2 * step],
                                          low.levels[2 * step + 1], high.levels[2 * step + 1]};
                uint32_t const right[2] = {tokens[2 * step], tokens[2 * step + 1]};
                multiplyTile(sums[tile], left, right);
            }
        }
    }
};

__device__ inline int64_t least(int64_t left, int64_t right) {
    return left < right ? left : right;
}

// One block's share of a product.
template <int32_t kBits, int32_t kTokenTiles>
struct PackedTile {
    using Work = Share<kTokenTiles>;
    using Run = RunOf<kBits>;
    // Loads of codes that are on their way while earlier ones are multiplied.
    static constexpr int32_t kAhead = kBits == 3 ? 1 : 2;

    Product const& product;
    DecodeArguments const& weight;

    __device__ static int32_t lane() {
        return static_cast<int32_t>(threadIdx.x) % kWarp;
    }

    __device__ static int32_t rowWarp() {
        return static_cast<int32_t>(threadIdx.x) / kWarp % Work::kRowWarps;
    }

    __device__ static int32_t colWarp() {
        return static_cast<int32_t>(threadIdx.x) / kWarp / Work::kRowWarps;
    }

    // Of the tile: the first of the two rows of this lane; the other is 8 below.
    __device__ static int32_t lowRow() {
        return rowWarp() * kMmaRows + lane() / kQuads;
    }

    __device__ int64_t firstRow() const {
        return static_cast<int64_t>(blockIdx.x) * Work::kRows;
    }

    __device__ int32_t groups() const {
        return static_cast<int32_t>(weight.cols / weight.groupSize);
    }

    // tables (kRows, groups), then one of zeros.
    __device__ void makeTables(LookupTable<kBits>* tables) const {
        int8_t* const entries = reinterpret_cast<int8_t*>(tables);
        int32_t const zeros = (Work::kRows * groups()) << kBits;
        for (int32_t entry = static_cast<int32_t>(threadIdx.x); entry < zeros + (1 << kBits);
             entry += kThreads) {
            int32_t const code = entry & ((1 << kBits) - 1);
            int32_t const group = entry >> kBits;
            int64_t const row = least(firstRow() + group / groups(), weight.rows - 1);
            int64_t const source = row * groups() + group % groups();
            entries[entry] =
                static_cast<int8_t>(entry < zeros ? levelOf(weight, source, code) : 0);
        }
    }

    // Codes of a row of the tile; rows beyond the last are copies of it, whose sums nobody stores.
    __device__ uint8_t const* codesOf(int32_t row) const {
        return weight.codes +
               least(firstRow() + row, weight.rows - 1) * wordsRowBytes(kBits, weight.cols);
    }

    __device__ void multiply(LookupTable<kBits> const* tables,
                             Accumulator<kBits, kTokenTiles>& accumulator) const {
        int8_t const* activations[kTokenTiles];
#pragma unroll
        for (int32_t tile = 0; tile < kTokenTiles; ++tile) {
            int64_t const token = least(tile * kMmaTokens + lane() / kQuads, product.tokens - 1);
            activations[tile] = product.quantized + token * product.cols;
        }
        uint8_t const* const lowCodes = codesOf(lowRow());
        uint8_t const* const highCodes = codesOf(lowRow() + kMmaRows / 2);
        LookupTable<kBits> const* const lowTables = tables + lowRow() * groups();
        LookupTable<kBits> const* const highTables = lowTables + kMmaRows / 2 * groups();
        LookupTable<kBits> const* const zeros = tables + Work::kRows * groups();
        int32_t const groupSize = groups() == 1 ? 0 : static_cast<int32_t>(weight.groupSize);

        int32_t const runs = static_cast<int32_t>(weight.cols / Run::kCols);
        int32_t const step = Work::kColWarps * kQuads;
        int32_t const start = colWarp() * kQuads;
        int32_t const quad = lane() % kQuads;
        Run low[kAhead];
        Run high[kAhead];
#pragma unroll
        for (int32_t ahead = 0; ahead < kAhead; ++ahead) {
            int32_t const run = static_cast<int32_t>(least(start + ahead * step + quad, runs - 1));
            low[ahead].load(lowCodes, run);
            high[ahead].load(highCodes, run);
        }
        for (int32_t first = start; first < runs; first += kAhead * step) {
#pragma unroll
            for (int32_t ahead = 0; ahead < kAhead; ++ahead) {
                int32_t const run = first + ahead * step + quad;
                if (run - quad < runs) {  // for all lanes alike
                    // The tensor cores need the whole warp: lanes beyond the last run multiply
                    // by zeros.
                    bool const isLive = run < runs;
                    int32_t const col = (isLive ? run : runs - 1) * Run::kCols;
                    accumulator.add(low[ahead], high[ahead], isLive ? lowTables : zeros,
                                    isLive ? highTables : zeros, col, isLive ? groupSize : 0,
                                    activations);
                    int32_t const next =
                        static_cast<int32_t>(least(run + kAhead * step, runs - 1));
                    low[ahead].load(lowCodes, next);
                    high[ahead].load(highCodes, next);
                }
            }
        }
    }
};

// sums (kColWarps, kTokens, kRows), each written by the one lane that has it.
template <int32_t kBits, int32_t kTokenTiles>
__device__ inline void storeSums(
    Accumulator<kBits, kTokenTiles> const& accumulator, int32_t* sums) {
    using Work = Share<kTokenTiles>;
    using Tile = PackedTile<kBits, kTokenTiles>;
    int32_t* const own = sums + Tile::colWarp() * Work::kTokens * Work::kRows;
#pragma unroll
    for (int32_t tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
        for (int32_t index = 0; index < 4; ++index) {
            int32_t const row = Tile::lowRow() + index / 2 * (kMmaRows / 2);
            int32_t const token = tile * kMmaTokens + Tile::lane() % kQuads * 2 + index % 2;
            own[token * Work::kRows + row] = accumulator.sums[tile][index];
        }
    }
}

template <class T, int32_t kTokenTiles>
__device__ inline void storeTile(Product const& product, int64_t firstRow, int32_t const* sums) {
    using Work = Share<kTokenTiles>;
    constexpr int32_t kOutputs = Work::kTokens * Work::kRows;
    for (int32_t index = static_cast<int32_t>(threadIdx.x); index < kOutputs; index += kThreads) {
        int32_t const token = index / Work::kRows;
        int64_t const row = firstRow + index % Work::kRows;
        if (token < product.tokens && row < product.rows) {
            int32_t sum = 0;
#pragma unroll
            for (int32_t warp = 0; warp < Work::kColWarps; ++warp) {
                sum += sums[warp * kOutputs + index];
            }
            storeSum<T>(product, sum, token, row);
        }
    }
}

// Blocks of a processor that registers must allow; 0: as ptxas likes. For few tokens it would
// rather spill inside the loop than have fewer than three.
constexpr int32_t leastBlocks(int32_t tokenTiles) {
    return tokenTiles == 1 ? 2 : 0;
}

template <int32_t kBits, int32_t kTokenTiles>
__global__ void __launch_bounds__(kThreads, leastBlocks(kTokenTiles))
    multiplyPacked(Product const product, DecodeArguments const weight, int32_t type) {
    PackedTile<kBits, kTokenTiles> const tile{product, weight};
    LookupTable<kBits>* const tables = sharedMemory<LookupTable<kBits>>();
    tile.makeTables(tables);
    synchronizeBlock();
    Accumulator<kBits, kTokenTiles> accumulator{};
    tile.multiply(tables, accumulator);
    synchronizeBlock();  // tables have been read: sums take their place
    int32_t* const sums = sharedMemory<int32_t>();
    storeSums(accumulator, sums);
    synchronizeBlock();
    if (type == LRQ_FLOAT) {
        storeTile<float, kTokenTiles>(product, tile.firstRow(), sums);
    } else if (type == LRQ_HALF) {
        storeTile<Half, kTokenTiles>(product, tile.firstRow(), sums);
    } else {
        storeTile<Bfloat16, kTokenTiles>(product, tile.firstRow(), sums);
    }
}

// 8, 16, 32 or 64 tokens.
int32_t tokenTilesFor(int64_t tokens) {
    int32_t tiles = 1;
    while (tiles * kMmaTokens < tokens) {
        tiles *= 2;
    }
    return tiles;
}

int64_t tableBytes(DecodeArguments const& weight, int32_t tokenTiles) {
    int64_t const groups = weight.cols / weight.groupSize;
    return (kMmaRows * tokenTiles * groups + 1) << weight.bits;
}

template <int32_t kBits, int32_t kTokenTiles>
bool launchTile(Product const& product, DecodeArguments const& weight, int32_t type,
                cudaStream_t stream) {
    using Work = Share<kTokenTiles>;
    int64_t const blocks = (product.rows + Work::kRows - 1) / Work::kRows;
    int64_t const tables = tableBytes(weight, kTokenTiles);
    int64_t const sums = Work::kSums * static_cast<int64_t>(sizeof(int32_t));
    Grid const grid{blocks, kThreads, tables > sums ? tables : sums};
    return launch(multiplyPacked<kBits, kTokenTiles>, grid, stream, product, weight, type);
}

template <int32_t kBits>
bool launchBits(Product const& product, DecodeArguments const& weight, int32_t type,
                cudaStream_t stream) {
    switch (tokenTilesFor(product.tokens)) {
        case 1:
            return launchTile<kBits, 1>(product, weight, type, stream);
        case 2:
            return launchTile<kBits, 2>(product, weight, type, stream);
        case 4:
            return launchTile<kBits, 4>(product, weight, type, stream);
        default:
            return launchTile<kBits, 8>(product, weight, type, stream);
    }
}

int64_t colsOfRun(int32_t bits) {
    return bits == 4   ? RunOf<4>::kCols
           : bits == 3 ? RunOf<3>::kCols
                       : RunOf<2>::kCols;
}

}  // namespace

bool fewTokensFit(DecodeArguments const& weight, int64_t tokens) {
    return weight.format != Format::kInt8 && weight.layout == CodesLayout::kWords &&
           tokens <= kMostFewTokens && weight.cols % colsOfRun(weight.bits) == 0 &&
           weight.groupSize % kPieceCols == 0 &&
           tableBytes(weight, tokenTilesFor(tokens)) <= kMostTableBytes;
}

bool multiplyFewTokens(Product const& product, DecodeArguments const& weight, int32_t type,
                       cudaStream_t stream) {
    switch (weight.bits) {
        case 4:
            return launchBits<4>(product, weight, type, stream);
        case 3:
            return launchBits<3>(product, weight, type, stream);
        default:
            return launchBits<2>(product, weight, type, stream);
    }
}

}  // namespace lrq
