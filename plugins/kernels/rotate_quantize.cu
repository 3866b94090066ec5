// Prologue, rotation and quantization of every token: picks the kernel. LRQ_ELEMENT and
// LRQ_ROTATE name the element type and the function of a compilation.
#include "rotate_in_registers.h"
#include "rotate_in_shared_memory.h"

namespace lrq {
namespace {

// One run a thread for few channels; then two, among which the work of a thread is shared that does
// not depend on how many channels it has. 64 registers hold two runs, so a block can be full.
constexpr int32_t kSingleThreads = 96;
constexpr int32_t kDoubleThreads = 1024;

// Whether every row begins at a whole vector; one that is absent does.
bool rowsAreAligned(TokenRows const& rows) {
    constexpr int64_t kPerVector = kVectorBytes / sizeof(LRQ_ELEMENT);
    return reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0 &&
           rows.outerStride % kPerVector == 0 && rows.innerStride % kPerVector == 0;
}

bool fitsRegisters(RotateArguments const& arguments) {
    int32_t const block = arguments.block;
    return (block & (block - 1)) == 0 && block <= kWidestBlock &&
           arguments.channels % kRun == 0 && arguments.channels <= 2 * kRun * kDoubleThreads &&
           rowsAreAligned(arguments.scale) && rowsAreAligned(arguments.shift);
}

int32_t wholeWarps(int32_t threads) {
    return (threads + kWarp - 1) / kWarp * kWarp;
}

template <PrologueKind kKind>
bool launchInRegisters(RotateArguments const& arguments, cudaStream_t stream) {
    int32_t const runs = arguments.channels / kRun;
    if (runs <= kSingleThreads) {
        return launch(rotateInRegisters<LRQ_ELEMENT, kKind, 1, kSingleThreads>,
                      {arguments.tokens, wholeWarps(runs)}, stream, arguments);
    }
    return launch(rotateInRegisters<LRQ_ELEMENT, kKind, 2, kDoubleThreads>,
                  {arguments.tokens, wholeWarps((runs + 1) / 2)}, stream, arguments);
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

}  // namespace

bool LRQ_ROTATE(RotateArguments const& arguments, cudaStream_t stream) {
    if (!fitsRegisters(arguments)) {
        return launchInSharedMemory(arguments, stream);
    }
    switch (kindOf(static_cast<Prologue>(arguments.prologue))) {
        case PrologueKind::kNone:
            return launchInRegisters<PrologueKind::kNone>(arguments, stream);
        case PrologueKind::kNorm:
            return launchInRegisters<PrologueKind::kNorm>(arguments, stream);
        default:
            return launchInRegisters<PrologueKind::kActivation>(arguments, stream);
    }
}

}  // namespace lrq
