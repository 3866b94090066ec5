// Device memory between sentinels: whoever writes beside it is seen.
#pragma once

#include <algorithm>
#include <vector>

#include "memory.h"

class GuardedBuffer {
public:
    // `contents` begin at a multiple of 256 bytes, as TensorRT's tensors do.
    explicit GuardedBuffer(std::vector<uint8_t> contents)
        : mContents(std::move(contents)), mMemory(kGuard + mContents.size() + kGuard) {
        std::vector<uint8_t> whole(kGuard + mContents.size() + kGuard, kSentinel);
        std::copy(mContents.begin(), mContents.end(), whole.begin() + kGuard);
        mMemory.write(whole);
    }

    void* data() { return mMemory.data() + kGuard; }

    std::vector<uint8_t> read() const {
        std::vector<uint8_t> const whole = mMemory.read();
        return {whole.begin() + kGuard, whole.end() - kGuard};
    }

    bool isUntouched() const { return read() == mContents; }

    bool guardsHold() const {
        std::vector<uint8_t> const whole = mMemory.read();
        auto const isSentinel = [](uint8_t byte) { return byte == kSentinel; };
        return std::all_of(whole.begin(), whole.begin() + kGuard, isSentinel) &&
               std::all_of(whole.end() - kGuard, whole.end(), isSentinel);
    }

    static constexpr uint8_t kSentinel = 0xa5;

private:
    static constexpr size_t kGuard = 4096;

    std::vector<uint8_t> mContents;
    Memory mMemory;
};
