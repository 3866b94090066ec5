#include "emulator.h"

#include <csetjmp>

EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace lrq {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int32_t kMostThreads = 1024;
constexpr int32_t kWarpLanes = 32;
constexpr int64_t kMostSharedBytes = 97 * 1024;  // dynamic, of the 99 KiB that the device says it has
constexpr size_t kFenceBytes = 1024;
constexpr uint8_t kUndefined = 0xff;  // no number

struct Barrier {
    int32_t arrived = 0;
    int32_t generation = 0;
};

// Starts on a stack of its own; from then on jumps switch to it and back, which unlike swapcontext
// ask nothing of the kernel.
struct Thread {
    ucontext_t start;
    jmp_buf jump;
    std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
    bool isStarted;
    bool isDone;
};

struct Block {
    std::vector<Thread> threads;
    int32_t count;
    Barrier all;
    Barrier warps[kMostThreads / kWarpLanes];
    WarpExchange exchanges[kMostThreads / kWarpLanes];
    std::vector<uint8_t> shared;  // with a fence behind it
    jmp_buf scheduler;
    int32_t current;
    int64_t progress;  // changes whenever a thread gets on
    void (*body)(void*);
    void* bodyContext;
    char const* kernel = "";
};

Block block;

Thread& currentThread() {
    return block.threads[static_cast<size_t>(block.current)];
}

void yield() {
    if (_setjmp(currentThread().jump) == 0) {
        _longjmp(block.scheduler, 1);
    }
}

// Runs a thread until it yields. No local lives across the jumps.
__attribute__((noinline)) void resumeCurrent() {
    if (_setjmp(block.scheduler) != 0) {
        return;
    }
    if (currentThread().isStarted) {
        _longjmp(currentThread().jump, 1);
    }
    currentThread().isStarted = true;
    setcontext(&currentThread().start);
}

void waitAt(Barrier& barrier, int32_t expected) {
    int32_t const generation = barrier.generation;
    ++block.progress;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) {
        yield();
    }
    ++block.progress;
}

void runThread() {
    block.body(block.bodyContext);
    currentThread().isDone = true;
    ++block.progress;
    yield();
}

void prepareThread(Thread& thread) {
    thread.isStarted = false;
    thread.isDone = false;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, runThread, 0);
}

// One turn of every thread of a warp that is not done; whether there was any.
bool runTurn(int32_t warp) {
    bool isAnyLeft = false;
    int32_t const end = (warp + 1) * kWarpLanes;
    for (int32_t index = warp * kWarpLanes; index < end && index < block.count; ++index) {
        block.current = index;
        threadIdx.x = static_cast<uint32_t>(index);
        if (!currentThread().isDone) {
            isAnyLeft = true;
            resumeCurrent();
        }
    }
    return isAnyLeft;
}

// Runs a warp as far as it gets without the others; whether anything of it is left.
bool runWarp(int32_t warp) {
    bool isAnyLeft = true;
    int64_t seen = block.progress - 1;
    while (isAnyLeft && seen != block.progress) {
        seen = block.progress;
        isAnyLeft = runTurn(warp);
    }
    return isAnyLeft;
}

// Every warp as far as it gets, so that one is a whole barrier of the block ahead of the next: what
// relies on a barrier that is not there reads what is not written yet, or is written already. Even
// blocks begin with their first warp, odd ones with their last.
void runBlock() {
    for (int32_t index = 0; index < block.count; ++index) {
        prepareThread(block.threads[static_cast<size_t>(index)]);
    }
    int32_t const warps = (block.count + kWarpLanes - 1) / kWarpLanes;
    bool isAnyLeft = true;
    int64_t seen = block.progress - 1;
    while (isAnyLeft && seen != block.progress) {
        seen = block.progress;
        isAnyLeft = false;
        for (int32_t index = 0; index < warps; ++index) {
            bool const isLeft = runWarp(blockIdx.x % 2 == 0 ? index : warps - 1 - index);
            isAnyLeft = isLeft || isAnyLeft;
        }
    }
    if (isAnyLeft) {
        std::fprintf(stderr,
                     "emulator: threads of block %u wait at barriers that others never reach\n",
                     blockIdx.x);
        std::abort();
    }
}

// Nobody may have stored behind the shared memory that was asked for.
void checkFence(size_t sharedBytes) {
    for (size_t index = sharedBytes; index < block.shared.size(); ++index) {
        if (block.shared[index] != kUndefined) {
            std::fprintf(stderr, "emulator: byte %zu of %zu of shared memory was written\n", index,
                         sharedBytes);
            std::abort();
        }
    }
}

}  // namespace

void synchronizeBlock() {
    waitAt(block.all, block.count);
}

void synchronizeWarp() {
    int32_t const warp = block.current / kWarpLanes;
    int32_t const left = block.count - warp * kWarpLanes;
    waitAt(block.warps[warp], left < kWarpLanes ? left : kWarpLanes);
}

WarpExchange& warpExchange() {
    return block.exchanges[block.current / kWarpLanes];
}

uint8_t* sharedBytes() {
    return block.shared.data();
}

bool runGrid(Grid const& grid, char const* kernel, void (*body)(void*), void* context) {
    if (grid.blocks < 1 || grid.blocks > INT32_MAX || grid.threads < 1 ||
        grid.threads > kMostThreads || grid.sharedBytes > kMostSharedBytes) {
        return false;
    }
    if (block.threads.empty()) {
        block.threads = std::vector<Thread>(kMostThreads);
    }
    block.count = grid.threads;
    block.body = body;
    block.bodyContext = context;
    block.kernel = kernel;
    blockDim.x = static_cast<uint32_t>(grid.threads);
    gridDim.x = static_cast<uint32_t>(grid.blocks);
    for (int64_t index = 0; index < grid.blocks; ++index) {
        blockIdx.x = static_cast<uint32_t>(index);
        size_t const sharedBytes = static_cast<size_t>(grid.sharedBytes);
        block.shared.assign(sharedBytes + kFenceBytes, kUndefined);
        runBlock();
        checkFence(sharedBytes);
    }
    return true;
}

}  // namespace lrq

// What was launched last: a text with the types of its kernel's parameters, and its threads.
extern "C" __attribute__((visibility("default"))) char const* emulatedKernel() {
    return lrq::block.kernel;
}

extern "C" __attribute__((visibility("default"))) int32_t emulatedThreads() {
    return lrq::block.count;
}
