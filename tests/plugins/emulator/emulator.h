// A GPU for the kernels of plugins/kernels that tests can run anywhere: plugins/kernels/device.h
// and runtime.h include it under LRQ_EMULATED instead of CUDA.
//
// Blocks run one after the other. Every thread of a block is a coroutine that runs until it waits
// at a barrier, so shared memory, barriers, shuffles and tensor-core fragments mean what they mean
// on a GPU, index by index. Warps run in the order that a missing barrier of the block bears worst:
// each as far as it gets before the next one starts. What waits for threads that never come is an
// error, as are stores outside of dynamic shared memory, or of memory that the caller fences with
// sentinels. Of memory order, speed and lanes of a warp that drift apart it knows nothing.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../../plugins/kernels/product.h"

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(8) uint2 {
    uint32_t x, y;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

struct EmulatedIndex {
    uint32_t x;
};

extern EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace lrq {

struct Half {
    uint16_t bits;
};

struct Bfloat16 {
    uint16_t bits;
};

inline float toFloat(float value) {
    return value;
}

inline float toFloat(Half value) {
    _Float16 half;
    std::memcpy(&half, &value.bits, sizeof(half));
    return static_cast<float>(half);
}

inline float toFloat(Bfloat16 value) {
    uint32_t const bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

template <class T>
T fromFloat(float value);

template <>
inline float fromFloat<float>(float value) {
    return value;
}

template <>
inline Half fromFloat<Half>(float value) {
    _Float16 const half = static_cast<_Float16>(value);
    Half result;
    std::memcpy(&result.bits, &half, sizeof(half));
    return result;
}

template <>
inline Bfloat16 fromFloat<Bfloat16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (std::isnan(value)) {
        return {0x7fff};
    }
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // half to even
}

template <class T>
uint32_t packTwo(float first, float second) {
    T const two[2] = {fromFloat<T>(first), fromFloat<T>(second)};
    uint32_t packed;
    std::memcpy(&packed, two, sizeof(packed));
    return packed;
}

template <class T>
void unpackTwo(uint32_t packed, float& first, float& second) {
    T two[2];
    std::memcpy(two, &packed, sizeof(packed));
    first = toFloat(two[0]);
    second = toFloat(two[1]);
}

inline int32_t bitsOf(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float floatOf(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline float multiplyAdd(float a, float b, float c) {
    return std::fma(a, b, c);
}

inline int32_t dot4(uint32_t left, uint32_t right, int32_t sum) {
    for (int32_t shift = 0; shift < 32; shift += 8) {
        sum += static_cast<int8_t>(left >> shift) * static_cast<int8_t>(right >> shift);
    }
    return sum;
}

inline uint4 loadOnce(uint4 const* address) {
    return *address;
}

void synchronizeBlock();
void synchronizeWarp();

// What the lanes of this thread's warp lay open to each other between two barriers.
struct WarpExchange {
    float values[32];
    uint32_t left[32][4];
    uint32_t right[32][2];
};
WarpExchange& warpExchange();

inline float shuffleXor(float value, int32_t mask) {
    uint32_t const lane = threadIdx.x % 32;
    warpExchange().values[lane] = value;
    synchronizeWarp();
    float const result = warpExchange().values[lane ^ static_cast<uint32_t>(mask)];
    synchronizeWarp();
    return result;
}

inline int32_t maximumOfWarp(int32_t value) {
    for (int32_t mask = 16; mask > 0; mask /= 2) {
        int32_t const other = bitsOf(shuffleXor(floatOf(value), mask));
        value = other > value ? other : value;
    }
    return value;
}

// left (16, 32) and right (32, 8) of a warp from the words that PTX's m16n8k32 says each lane
// holds.
inline int8_t leftAt(WarpExchange const& all, int32_t row, int32_t col) {
    int32_t const lane = row % 8 * 4 + col % 16 / 4;
    int32_t const word = row / 8 + 2 * (col / 16);
    return static_cast<int8_t>(all.left[lane][word] >> (8 * (col % 4)));
}

inline int8_t rightAt(WarpExchange const& all, int32_t row, int32_t col) {
    int32_t const lane = col * 4 + row % 16 / 4;
    return static_cast<int8_t>(all.right[lane][row / 16] >> (8 * (row % 4)));
}

inline void multiplyTile(
    int32_t (&sums)[4], uint32_t const (&left)[4], uint32_t const (&right)[2]) {
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % 32;
    WarpExchange& all = warpExchange();
    std::memcpy(all.left[lane], left, sizeof(left));
    std::memcpy(all.right[lane], right, sizeof(right));
    synchronizeWarp();
    for (int32_t index = 0; index < 4; ++index) {
        int32_t const row = lane / 4 + index / 2 * 8;
        int32_t const col = lane % 4 * 2 + index % 2;
        for (int32_t k = 0; k < 32; ++k) {
            sums[index] += leftAt(all, row, k) * rightAt(all, k, col);
        }
    }
    synchronizeWarp();
}

uint8_t* sharedBytes();

template <class T>
T* sharedMemory() {
    return reinterpret_cast<T*>(sharedBytes());
}

struct Grid {
    int64_t blocks;
    int32_t threads;
    int64_t sharedBytes = 0;
};

// Runs `body` as every thread of every block. False if the grid is none that a GPU takes. `kernel`
// tells kernels apart by their parameters.
bool runGrid(Grid const& grid, char const* kernel, void (*body)(void*), void* context);

template <class... Parameters>
bool launch(void (*kernel)(Parameters...), Grid grid, cudaStream_t,
            std::common_type_t<Parameters>... parameters) {
    auto call = [&] { kernel(parameters...); };
    return runGrid(
        grid, __PRETTY_FUNCTION__,
        [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

inline bool queryDevice(Device* device) {
    *device = {80, 4, 99 * 1024};
    return true;
}

inline bool copyBytes(void* target, void const* source, int64_t bytes, cudaStream_t) {
    std::memcpy(target, source, static_cast<size_t>(bytes));
    return true;
}

inline char const* lastCudaError() {
    return "emulated";
}

}  // namespace lrq
