// Prologue, rotation and quantization of every token: picks the kernel. LRQ_ELEMENT and
// LRQ_ROTATE name the element type and the function of a compilation.
#include "rotate_columns.h"
#include "rotate_in_shared_memory.h"
#include "rotate_runs.h"

namespace lrq {
namespace {

// One run a thread for few channels; then two, among which the work of a thread is shared that does
// not depend on how many channels it has. 64 registers hold two runs, so a block can be full.
constexpr int32_t kSingleThreads = 96;
constexpr int32_t kDoubleThreads = 1024;

// Tokens of up to 1536 channels in one block, 32 channels a thread: alone, a token of 1152 would leave
// a quarter of three warps idle.
constexpr int32_t kTogether = 8;
constexpr int32_t kTogetherThreads = 384;

// What every device has for a block, less what kernels have besides.
constexpr int64_t kMostExchangeBytes = 96 * 1024;

// The closed list of columns, the first that fits is taken. Blocks of 64 to 256 have parts of 16, so
// nothing is shuffled. More parts of a block in one thread are fewer shuffles; registers bound them.
template <class... Layouts>
struct List {};

using ColumnLayouts =
    List<Columns<1, 4, 8, 4, kTogetherThreads, kTogether>,
         Columns<1, 8, 4, 4, kTogetherThreads, kTogether>,
         Columns<1, 16, 2, 4, kTogetherThreads, kTogether>, Columns<1, 4, 4, 4, kSingleThreads>,
         Columns<1, 4, 8, 4, 640>, Columns<1, 8, 4, 4, 640>, Columns<1, 16, 2, 4, 640>,
         Columns<1, 32, 1, 0, 640>, Columns<12, 4, 1, 0, 512>, Columns<20, 2, 1, 0, 512>,
         Columns<28, 2, 1, 0, 512>, Columns<36, 1, 1, 0, 512>, Columns<44, 1, 1, 0, 512>,
         Columns<60, 1, 1, 0, 384>, SplitColumns<76, 2, 384>, SplitColumns<108, 4, 640>,
         SplitColumns<140, 5, 640>>;

// Whether every row begins at a whole vector; one that is absent does.
bool rowsAreAligned(TokenRows const& rows) {
    constexpr int64_t kPerVector = kVectorBytes / sizeof(LRQ_ELEMENT);
    return reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0 &&
           rows.outerStride % kPerVector == 0 && rows.innerStride % kPerVector == 0;
}

// Whether registers can hold tokens in whole vectors.
bool hasWholeRuns(RotateArguments const& arguments) {
    return arguments.channels % kRun == 0 && rowsAreAligned(arguments.scale) &&
           rowsAreAligned(arguments.shift);
}

bool fitsRuns(RotateArguments const& arguments) {
    int32_t const block = arguments.block;
    return (block & (block - 1)) == 0 && block <= kWidestShuffled &&
           arguments.channels <= 2 * kRun * kDoubleThreads;
}

int32_t wholeWarps(int32_t threads) {
    return (threads + kWarp - 1) / kWarp * kWarp;
}

template <PrologueKind kKind>
bool launchRuns(RotateArguments const& arguments, cudaStream_t stream) {
    int32_t const runs = arguments.channels / kRun;
    if (runs <= kSingleThreads) {
        return launch(rotateRuns<LRQ_ELEMENT, kKind, 1, kSingleThreads>,
                      {arguments.tokens, wholeWarps(runs)}, stream, arguments);
    }
    return launch(rotateRuns<LRQ_ELEMENT, kKind, 2, kDoubleThreads>,
                  {arguments.tokens, wholeWarps((runs + 1) / 2)}, stream, arguments);
}

using Launcher = bool (*)(RotateArguments const&, cudaStream_t);

// log2 of the largest part of 2^m channels that leaves whole ones.
template <class Layout>
int32_t partLogOf(int32_t block) {
    int32_t log = 0;
    while (block % (Layout::kParts << (log + 1)) == 0) {
        ++log;
    }
    return log;
}

// What a block of tokens takes, threads not yet in whole warps.
template <class Layout>
Grid gridOf(RotateArguments const& arguments) {
    constexpr int32_t kTokens = Layout::kTokens;
    int32_t const threads = arguments.channels / (Layout::kVectors * Layout::kWidth);
    int64_t const bytes =
        Layout::sharedBytes(partLogOf<Layout>(arguments.block), arguments.channels);
    return {(arguments.tokens + kTokens - 1) / kTokens, kTokens * threads, kTokens * bytes};
}

template <class Layout>
bool fitsColumns(RotateArguments const& arguments) {
    int32_t const log = partLogOf<Layout>(arguments.block);
    if (Layout::kParts << log != arguments.block || !Layout::takesPart(log)) {
        return false;
    }
    Grid const grid = gridOf<Layout>(arguments);
    bool const isFull = grid.threads % kWarp == 0;
    return (isFull || Layout::kTokens == 1) && grid.threads <= Layout::kMaxThreads &&
           grid.sharedBytes <= kMostExchangeBytes;
}

template <PrologueKind kKind, class Layout>
bool launchColumns(RotateArguments const& arguments, cudaStream_t stream) {
    Grid grid = gridOf<Layout>(arguments);
    grid.threads = wholeWarps(grid.threads);
    return launch(rotateColumns<LRQ_ELEMENT, kKind, Layout>, grid, stream, arguments,
                  partLogOf<Layout>(arguments.block));
}

// Null if no layout fits.
template <PrologueKind kKind, class... Layouts>
Launcher findColumns(RotateArguments const& arguments, List<Layouts...>) {
    Launcher found = nullptr;
    ((found = found == nullptr && fitsColumns<Layouts>(arguments) ? launchColumns<kKind, Layouts>
                                                                  : found),
     ...);
    return found;
}

template <PrologueKind kKind>
Launcher findInRegisters(RotateArguments const& arguments) {
    if (!hasWholeRuns(arguments)) {
        return nullptr;
    }
    Launcher const columns = findColumns<kKind>(arguments, ColumnLayouts{});
    if (columns == nullptr && fitsRuns(arguments)) {
        return launchRuns<kKind>;
    }
    return columns;
}

bool launchInSharedMemory(RotateArguments const& arguments, cudaStream_t stream) {
    HadamardFactors factors{};
    if (!factorizeHadamard(arguments.block, &factors)) {
        return false;
    }
    int64_t const bytes = rotateSharedBytes(arguments.block, factors.base.size);
    return launch(rotateInSharedMemory<LRQ_ELEMENT>, {arguments.tokens, kSharedThreads, bytes},
                  stream, arguments, factors);
}

Launcher findLauncher(RotateArguments const& arguments) {
    switch (kindOf(static_cast<Prologue>(arguments.prologue))) {
        case PrologueKind::kNone:
            return findInRegisters<PrologueKind::kNone>(arguments);
        case PrologueKind::kNorm:
            return findInRegisters<PrologueKind::kNorm>(arguments);
        default:
            return findInRegisters<PrologueKind::kActivation>(arguments);
    }
}

}  // namespace

bool LRQ_ROTATE(RotateArguments const& arguments, cudaStream_t stream) {
    Launcher const inRegisters = findLauncher(arguments);
    return inRegisters != nullptr ? inRegisters(arguments, stream)
                                  : launchInSharedMemory(arguments, stream);
}

}  // namespace lrq
