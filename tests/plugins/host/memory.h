// Device memory of the machine that the kernels run on: the host's with kernels_on_cpu.cpp, or with
// LRQ_HOST_ON_GPU the GPU's.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(LRQ_HOST_ON_GPU)
#include <cuda_runtime_api.h>

inline void needCuda(cudaError_t status) {
    if (status != cudaSuccess) {
        throw std::runtime_error(cudaGetErrorString(status));
    }
}
#endif

class Memory {
public:
    explicit Memory(size_t bytes) : mBytes(bytes) {
#if defined(LRQ_HOST_ON_GPU)
        needCuda(cudaMalloc(&mData, bytes));
#else
        mData = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
#endif
    }
    Memory(Memory const&) = delete;
    ~Memory() {
#if defined(LRQ_HOST_ON_GPU)
        cudaFree(mData);
#else
        std::free(mData);
#endif
    }

    uint8_t* data() { return static_cast<uint8_t*>(mData); }

    void write(std::vector<uint8_t> const& bytes) {
#if defined(LRQ_HOST_ON_GPU)
        needCuda(cudaMemcpy(mData, bytes.data(), mBytes, cudaMemcpyHostToDevice));
#else
        std::memcpy(mData, bytes.data(), mBytes);
#endif
    }

    // What is there once everything enqueued is done.
    std::vector<uint8_t> read() const {
        std::vector<uint8_t> bytes(mBytes);
#if defined(LRQ_HOST_ON_GPU)
        needCuda(cudaDeviceSynchronize());
        needCuda(cudaMemcpy(bytes.data(), mData, mBytes, cudaMemcpyDeviceToHost));
#else
        std::memcpy(bytes.data(), mData, mBytes);
#endif
        return bytes;
    }

private:
    static constexpr size_t kAlignment = 256;

    void* mData{nullptr};
    size_t mBytes;
};
