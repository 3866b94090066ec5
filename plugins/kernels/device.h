// What our own kernels ask of the machine, all in one place: element types, collectives of a warp,
// tensor cores, vector loads and launches. tests/plugins/emulator has its twin for the CPU, which
// runs every thread of a block as a coroutine: with LRQ_EMULATED the kernels are plain C++ and can
// be tested, index by index, where there is no GPU.
#pragma once

#if defined(LRQ_EMULATED)
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>

namespace lrq {

using Half = __half;
using Bfloat16 = __nv_bfloat16;

__device__ inline float toFloat(float value) {
    return value;
}

__device__ inline float toFloat(Half value) {
    return __half2float(value);
}

__device__ inline float toFloat(Bfloat16 value) {
    return __bfloat162float(value);
}

template <class T>
__device__ inline T fromFloat(float value);

template <>
__device__ inline float fromFloat<float>(float value) {
    return value;
}

template <>
__device__ inline Half fromFloat<Half>(float value) {
    return __float2half_rn(value);
}

template <>
__device__ inline Bfloat16 fromFloat<Bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Two T of two bytes as they lie in memory, the first in the low half: one conversion for both.
template <class T>
__device__ inline uint32_t packTwo(float first, float second);

template <>
__device__ inline uint32_t packTwo<Half>(float first, float second) {
    __half2 const two = __floats2half2_rn(first, second);
    return *reinterpret_cast<uint32_t const*>(&two);
}

template <>
__device__ inline uint32_t packTwo<Bfloat16>(float first, float second) {
    __nv_bfloat162 const two = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<uint32_t const*>(&two);
}

template <class T>
__device__ inline void unpackTwo(uint32_t two, float& first, float& second);

template <>
__device__ inline void unpackTwo<Half>(uint32_t two, float& first, float& second) {
    float2 const floats = __half22float2(*reinterpret_cast<__half2 const*>(&two));
    first = floats.x;
    second = floats.y;
}

// A bfloat16 is the high half of its float.
template <>
__device__ inline void unpackTwo<Bfloat16>(uint32_t two, float& first, float& second) {
    first = __uint_as_float(two << 16);
    second = __uint_as_float(two & 0xffff0000u);
}

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ inline float shuffleXor(float value, int32_t mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
}

__device__ inline int32_t maximumOfWarp(int32_t value) {
    return __reduce_max_sync(kAllLanes, value);
}

__device__ inline void synchronizeBlock() {
    __syncthreads();
}

__device__ inline void synchronizeWarp() {
    __syncwarp();
}

__device__ inline int32_t bitsOf(float value) {
    return __float_as_int(value);
}

__device__ inline float floatOf(int32_t bits) {
    return __int_as_float(bits);
}

// a b + c, rounded once.
__device__ inline float multiplyAdd(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
}

// The sum of four products of INT8, added to `sum`.
__device__ inline int32_t dot4(uint32_t left, uint32_t right, int32_t sum) {
    return __dp4a(static_cast<int32_t>(left), static_cast<int32_t>(right), sum);
}

// Weights are read once: they shall not push activations out of L1.
__device__ inline uint4 loadOnce(uint4 const* address) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

// sums (16, 8) += left (16, 32) right (32, 8), INT8 on the tensor cores. With row = lane / 4 and
// quad = lane % 4 a lane holds left[row (+ 8 for words 1 and 3)][4 quad (+ 16 for words 2 and 3)
// ..], right[4 quad (+ 16 for word 1) ..][row], and sums[row (+ 8 for 2 and 3)][2 quad (+ 1 if
// odd)].
__device__ inline void multiplyTile(
    int32_t (&sums)[4], uint32_t const (&left)[4], uint32_t const (&right)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

template <class T>
__device__ inline T* sharedMemory() {
    extern __shared__ uint4 shared[];
    return reinterpret_cast<T*>(shared);
}

struct Grid {
    int64_t blocks;
    int32_t threads;
    int64_t sharedBytes = 0;
};

// A kernel that takes more than 48 KiB of shared memory has to opt in, to the dynamic part of it. What
// our kernels have of their own, up to 2 KiB, counts too, so they do a little earlier, and to no less
// than what is surely beyond.
constexpr int64_t kSharedBytesOfAnyKernel = 44 * 1024;
constexpr int64_t kLeastOptIn = 52 * 1024;

// What a launch opts in to; 0: nothing.
constexpr int64_t optInBytes(int64_t dynamic) {
    if (dynamic <= kSharedBytesOfAnyKernel) {
        return 0;
    }
    return dynamic > kLeastOptIn ? dynamic : kLeastOptIn;
}
static_assert(optInBytes(48 * 1024) > 48 * 1024 && optInBytes(46 * 1024 + 1) > 48 * 1024 &&
                  optInBytes(96 * 1024) == 96 * 1024 && optInBytes(0) == 0,
              "up to 2 KiB more than the dynamic part are less than 48 KiB, or it is opted in");

// Whether a kernel may have so much dynamic shared memory from now on. What it may have already is
// never lowered: another thread may be about to launch it with more.
inline bool allowShared(void const* function, int64_t bytes) {
    static std::mutex mutex;
    std::lock_guard<std::mutex> const guard(mutex);
    cudaFuncAttributes now{};
    if (cudaFuncGetAttributes(&now, function) != cudaSuccess) {
        return false;
    }
    return now.maxDynamicSharedSizeBytes >= bytes ||
           cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes)) == cudaSuccess;
}

// Whether CUDA took the launch. An error of another call, met earlier, is not reported as ours.
template <class... Parameters>
bool launch(void (*kernel)(Parameters...), Grid grid, cudaStream_t stream,
            std::common_type_t<Parameters>... parameters) {
    void const* const function = reinterpret_cast<void const*>(kernel);
    int64_t const optIn = optInBytes(grid.sharedBytes);
    if (optIn > 0 && !allowShared(function, optIn)) {
        return false;
    }
    void* pointers[] = {&parameters...};
    dim3 const blocks(static_cast<uint32_t>(grid.blocks));
    dim3 const threads(static_cast<uint32_t>(grid.threads));
    return cudaLaunchKernel(function, blocks, threads, pointers,
                            static_cast<size_t>(grid.sharedBytes), stream) == cudaSuccess;
}

}  // namespace lrq

#endif
