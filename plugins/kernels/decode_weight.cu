// Codes to weights at the speed of a copy: a thread turns 16 codes into one 16-byte store, and
// neighbours read and write neighbouring bytes. A warp takes one row: it makes the table of each
// group of the row in shared memory, a level a lane, and then looks codes up four at a time with
// byte permutations (core/table_decode.h): 1.4 instructions a weight, where a copy leaves room for
// 5.
#include <cstring>
#include <type_traits>

#include "../core/table_decode.h"
#include "decode_weight.h"
#include "device.h"
#include "level.h"

namespace lrq {
namespace {

constexpr int32_t kWarp = 32;
constexpr int32_t kThreads = 256;
constexpr int32_t kRun = 16;    // codes of a thread, one vector of INT8
constexpr int32_t kAhead = 4;   // runs that a thread loads before it decodes the first of them
constexpr int64_t kMostTableBytes = 48 * 1024;

struct Levels {
    uint32_t words[kRun / 4];
};

// 16 codes as they lie in memory: for 4 and 2 bits in both layouts.
template <int32_t kBits>
struct NibblesRun {
    static constexpr int32_t kCodeBits = kBits;
    static constexpr int32_t kUnits = kRun / Unit<kBits>::kCodes;
    using Vector = std::conditional_t<kBits == 4, uint2, uint32_t>;
    Unit<kBits> units[kUnits];
    static_assert(sizeof(units) == sizeof(Vector), "one load");

    __device__ void load(uint8_t const* row, int32_t run, int64_t) {
        Vector const vector = reinterpret_cast<Vector const*>(row)[run];
        memcpy(units, &vector, sizeof(units));
    }

    __device__ Levels decode(LookupTable<kBits> const& table, int32_t) const {
        Levels levels;
#pragma unroll
        for (int32_t unit = 0; unit < kUnits; ++unit) {
            decodeUnit(table, units[unit], levels.words + unit * (Unit<kBits>::kCodes / 4));
        }
        return levels;
    }

    static int64_t rowBytes(int64_t cols) {
        return wordsRowBytes(kBits, cols);
    }
};

// Half a unit of three words: codes 0..15, or 16..31 of which the last eight are spread over all.
struct WordsRun3 {
    static constexpr int32_t kCodeBits = 3;
    Unit<3> unit;

    __device__ void load(uint8_t const* row, int32_t run, int64_t) {
        unit = reinterpret_cast<Unit<3> const*>(row)[run / 2];
    }

    __device__ Levels decode(LookupTable<3> const& table, int32_t run) const {
        bool const isSecond = run % 2 != 0;
        uint32_t const first = isSecond ? unit.words[2] : unit.words[0];
        uint32_t const second = isSecond ? spreadCodes(unit) : unit.words[1];
        Levels levels;
        lookUp(table, first & 0x77777777u, levels.words);
        lookUp(table, second & 0x77777777u, levels.words + 2);
        return levels;
    }

    static int64_t rowBytes(int64_t cols) {
        return wordsRowBytes(3, cols);
    }
};

// Two bytes of each of the three planes of a row.
struct PlanesRun3 {
    static constexpr int32_t kCodeBits = 3;
    uint16_t planes[3];

    __device__ void load(uint8_t const* row, int32_t run, int64_t cols) {
#pragma unroll
        for (int32_t plane = 0; plane < 3; ++plane) {
            planes[plane] = reinterpret_cast<uint16_t const*>(row + plane * (cols / 8))[run];
        }
    }

    __device__ Levels decode(LookupTable<3> const& table, int32_t) const {
        Levels levels;
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
            int32_t const shift = 8 * half;
            decodePlanes(table, static_cast<uint8_t>(planes[0] >> shift),
                         static_cast<uint8_t>(planes[1] >> shift),
                         static_cast<uint8_t>(planes[2] >> shift), levels.words + 2 * half);
        }
        return levels;
    }

    static int64_t rowBytes(int64_t cols) {
        return 3 * (cols / 8);
    }
};

__device__ inline void storeLevels(int8_t* address, Levels const& levels, float) {
    *reinterpret_cast<uint4*>(address) = {levels.words[0], levels.words[1], levels.words[2],
                                          levels.words[3]};
}

__device__ inline void storeLevels(float* address, Levels const& levels, float scale) {
#pragma unroll
    for (int32_t word = 0; word < kRun / 4; ++word) {
        float weights[4];
#pragma unroll
        for (int32_t byte = 0; byte < 4; ++byte) {
            int8_t const level = static_cast<int8_t>(levels.words[word] >> (8 * byte));
            weights[byte] = scale * static_cast<float>(level);
        }
        uint4 packed;
        memcpy(&packed, weights, sizeof(packed));
        reinterpret_cast<uint4*>(address)[word] = packed;
    }
}

template <class Run, class Output>
__global__ void __launch_bounds__(kThreads)
    decodeRuns(DecodeArguments const arguments, int64_t rowBytes) {
    constexpr int32_t kBits = Run::kCodeBits;
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    int64_t const row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp;
    if (row >= arguments.rows) {
        return;  // a whole warp: no barrier below is wider
    }
    int32_t const groups = static_cast<int32_t>(arguments.cols / arguments.groupSize);
    int32_t const runs = static_cast<int32_t>(arguments.cols / kRun);
    int32_t const runsOfGroup = static_cast<int32_t>(arguments.groupSize / kRun);
    uint8_t const* const codes = arguments.codes + row * rowBytes;
    Output* const output = static_cast<Output*>(arguments.decoded) + row * arguments.cols;
    float const scale = arguments.rowScales == nullptr ? 1.0f : arguments.rowScales[row];

    LookupTable<kBits>* const tables = sharedMemory<LookupTable<kBits>>() + warp * groups;
    Run loaded[kAhead];
    for (int32_t first = lane; first - lane < runs; first += kAhead * kWarp) {
#pragma unroll
        for (int32_t ahead = 0; ahead < kAhead; ++ahead) {
            int32_t const run = first + ahead * kWarp;
            if (run < runs) {
                loaded[ahead].load(codes, run, arguments.cols);
            }
        }
        if (first == lane) {  // tables are made while the first codes are on their way
            int8_t* const entries = reinterpret_cast<int8_t*>(tables);
            for (int32_t entry = lane; entry < groups << kBits; entry += kWarp) {
                int32_t const code = entry & ((1 << kBits) - 1);
                int64_t const group = row * groups + (entry >> kBits);
                entries[entry] = static_cast<int8_t>(levelOf(arguments, group, code));
            }
            synchronizeWarp();
        }
#pragma unroll
        for (int32_t ahead = 0; ahead < kAhead; ++ahead) {
            int32_t const run = first + ahead * kWarp;
            if (run < runs) {
                LookupTable<kBits> const table = tables[groups == 1 ? 0 : run / runsOfGroup];
                Output* const address = output + static_cast<int64_t>(run) * kRun;
                storeLevels(address, loaded[ahead].decode(table, run), scale);
            }
        }
    }
}

// Any size and layout, one code a thread: for odd widths and groups.
__device__ inline int32_t levelAt(DecodeArguments const& arguments, int64_t row, int64_t col) {
    if (arguments.format == Format::kInt8) {
        return static_cast<int8_t>(arguments.codes[row * arguments.cols + col]);
    }
    int32_t const code =
        arguments.layout == CodesLayout::kWords
            ? readWordsCode(arguments.codes, arguments.bits, arguments.cols, row, col)
            : readCode(arguments.codes, arguments.bits, arguments.cols, row, col);
    int64_t const groups = arguments.cols / arguments.groupSize;
    return levelOf(arguments, row * groups + col / arguments.groupSize, code);
}

__device__ inline void storeLevel(int8_t* address, int32_t level, float) {
    *address = static_cast<int8_t>(level);
}

__device__ inline void storeLevel(float* address, int32_t level, float scale) {
    *address = scale * static_cast<float>(level);
}

template <class Output>
__global__ void __launch_bounds__(kThreads) decodeCodes(DecodeArguments const arguments) {
    int64_t const count = arguments.rows * arguments.cols;
    int64_t const step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < count;
         index += step) {
        int64_t const row = index / arguments.cols;
        float const scale = arguments.rowScales == nullptr ? 1.0f : arguments.rowScales[row];
        int32_t const level = levelAt(arguments, row, index % arguments.cols);
        storeLevel(static_cast<Output*>(arguments.decoded) + index, level, scale);
    }
}

constexpr int64_t kMostBlocks = 1 << 16;

template <class Output>
bool launchCodes(DecodeArguments const& arguments, cudaStream_t stream) {
    int64_t const count = arguments.rows * arguments.cols;
    int64_t const needed = (count + kThreads - 1) / kThreads;
    int64_t const blocks = needed < kMostBlocks ? needed : kMostBlocks;
    return launch(decodeCodes<Output>, {blocks, kThreads}, stream, arguments);
}

template <class Run, class Output>
bool launchRuns(DecodeArguments const& arguments, cudaStream_t stream) {
    constexpr int32_t kRows = kThreads / kWarp;
    int64_t const groups = arguments.cols / arguments.groupSize;
    int64_t const tableBytes = kRows * (groups << Run::kCodeBits);
    if (tableBytes > kMostTableBytes) {
        return launchCodes<Output>(arguments, stream);
    }
    int64_t const blocks = (arguments.rows + kRows - 1) / kRows;
    return launch(decodeRuns<Run, Output>, {blocks, kThreads, tableBytes}, stream, arguments,
                  Run::rowBytes(arguments.cols));
}

template <class Output>
bool decodeTo(DecodeArguments const& arguments, cudaStream_t stream) {
    bool const inRuns = arguments.format != Format::kInt8 && arguments.cols % kRun == 0 &&
                        arguments.groupSize % kRun == 0;
    if (!inRuns) {
        return launchCodes<Output>(arguments, stream);
    }
    if (arguments.bits == 4) {
        return launchRuns<NibblesRun<4>, Output>(arguments, stream);
    }
    if (arguments.bits == 2) {
        return launchRuns<NibblesRun<2>, Output>(arguments, stream);
    }
    return arguments.layout == CodesLayout::kWords
               ? launchRuns<WordsRun3, Output>(arguments, stream)
               : launchRuns<PlanesRun3, Output>(arguments, stream);
}

}  // namespace

bool decodeToInt8(DecodeArguments const& arguments, cudaStream_t stream) {
    return decodeTo<int8_t>(arguments, stream);
}

bool decodeToFloat(DecodeArguments const& arguments, cudaStream_t stream) {
    return decodeTo<float>(arguments, stream);
}

}  // namespace lrq
