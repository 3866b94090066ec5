// Rotate and quantize a token of any width and any block that has a Hadamard matrix, H = H_K (x)
// H_2^m: slower than in registers, and complete. One block of channels at a time lies in shared
// memory; x is read twice if the token is quantized, once for its scale and once for its codes.
#pragma once

#include "../core/hadamard.h"
#include "quantize.h"
#include "token_input.h"

namespace lrq {

constexpr int32_t kSharedThreads = 256;

template <class T>
struct SharedToken {
    RotateArguments const& arguments;
    HadamardBase const& base;
    int32_t power;
    int64_t token;
    float* channels;  // (block,)
    uint32_t* masks;  // (base.size, kMaskWords)
    float (*partials)[kMaxWarps];
    float mean;
    float factor;  // of a norm

    __device__ T const* row() const {
        int64_t const width =
            arguments.prologue == static_cast<int32_t>(Prologue::kGeglu) ? 2 : 1;
        return static_cast<T const*>(arguments.x) + token * width * arguments.channels;
    }

    __device__ float prologueAt(int32_t channel) const {
        Prologue const prologue = static_cast<Prologue>(arguments.prologue);
        float const x = toFloat(row()[channel]);
        if (prologue == Prologue::kNone) {
            return x;
        }
        if (prologue == Prologue::kGeglu) {
            return geglu(x, toFloat(row()[arguments.channels + channel]));
        }
        if (!isNorm(prologue)) {
            return activate(prologue, x);
        }
        float const scale = modulationAt(arguments.scale, channel);
        float const shift = modulationAt(arguments.shift, channel);
        return (x - mean) * factor * scale + shift;
    }

    __device__ float modulationAt(TokenRows const& rows, int32_t channel) const {
        return toFloat(rows.rowOf<T>(token)[channel]);
    }

    __device__ void findNorm() {
        float const count = static_cast<float>(arguments.channels);
        mean = 0.0f;
        if (arguments.prologue == static_cast<int32_t>(Prologue::kLayerNorm)) {
            mean = sumOver([](float x) { return x; }, 0) / count;
        }
        float const center = mean;
        float const meanSquare =
            sumOver([center](float x) { return (x - center) * (x - center); }, 1) / count;
        factor = inverseNorm(meanSquare, arguments.epsilon);
    }

    template <class Function>
    __device__ float sumOver(Function function, int32_t slot) const {
        float sum = 0.0f;
        for (int32_t channel = static_cast<int32_t>(threadIdx.x); channel < arguments.channels;
             channel += kSharedThreads) {
            sum += function(toFloat(row()[channel]));
        }
        return sumOfBlock(sum, partials[slot]);
    }

    __device__ void makeMasks() const {
        for (int32_t to = static_cast<int32_t>(threadIdx.x); to < base.size;
             to += kSharedThreads) {
            for (int32_t word = 0; word < kMaskWords; ++word) {
                uint32_t mask = 0;
                for (int32_t bit = 0; bit < 32 && 32 * word + bit < base.size; ++bit) {
                    bool const isNegative = hadamardEntry(base, 32 * word + bit, to) < 0;
                    mask |= static_cast<uint32_t>(isNegative) << bit;
                }
                masks[to * kMaskWords + word] = mask;
            }
        }
    }

    // channels = prologue(x) signs H_2^m for the block that begins at `start`.
    __device__ void loadBlock(int32_t start) const {
        T const* const signs = static_cast<T const*>(arguments.signs);
        int32_t const thread = static_cast<int32_t>(threadIdx.x);
        synchronizeBlock();  // the block before this one has been read
        for (int32_t index = thread; index < arguments.block; index += kSharedThreads) {
            float const sign = signs == nullptr ? 1.0f : toFloat(signs[start + index]);
            channels[index] = prologueAt(start + index) * sign;
        }
        for (int32_t half = 1; half < power; half *= 2) {
            synchronizeBlock();
            for (int32_t pair = thread; pair < arguments.block / 2; pair += kSharedThreads) {
                int32_t const index = pair / half * (2 * half) + pair % half;
                butterfly(channels[index], channels[index + half]);
            }
        }
        synchronizeBlock();
    }

    // Channel `index` of the rotated block: H_K over the channels of one place in all H_2^m.
    __device__ float rotatedAt(int32_t index) const {
        int32_t const to = index / power;
        int32_t const place = index % power;
        float sum = 0.0f;
        for (int32_t from = 0; from < base.size; ++from) {
            uint32_t const mask = masks[to * kMaskWords + from / 32] >> (from % 32) & 1;
            int32_t const sign = static_cast<int32_t>(mask << 31);
            sum += floatOf(bitsOf(channels[from * power + place]) ^ sign);
        }
        return toFloat(fromFloat<T>(sum * arguments.root));
    }

    template <class Function>
    __device__ void forEachRotated(Function function) const {
        for (int32_t start = 0; start < arguments.channels; start += arguments.block) {
            loadBlock(start);
            for (int32_t index = static_cast<int32_t>(threadIdx.x); index < arguments.block;
                 index += kSharedThreads) {
                function(start + index, rotatedAt(index));
            }
        }
    }
};

template <class T>
__global__ void __launch_bounds__(kSharedThreads)
    rotateInSharedMemory(RotateArguments const arguments, HadamardFactors const factors) {
    __shared__ float partials[3][kMaxWarps];
    __shared__ HadamardBase base;  // indexed at run time, which an argument is not without a copy
    if (threadIdx.x == 0) {
        base = factors.base;
    }
    synchronizeBlock();
    float* const channels = sharedMemory<float>();
    uint32_t* const masks = reinterpret_cast<uint32_t*>(channels + arguments.block);
    SharedToken<T> token{
        arguments, base, factors.power, static_cast<int64_t>(blockIdx.x), channels, masks, partials,
        0.0f, 1.0f};
    token.makeMasks();
    if (isNorm(static_cast<Prologue>(arguments.prologue))) {
        token.findNorm();
    }
    int64_t const start = token.token * arguments.channels;
    TokenQuantizer quantizer{};
    float peak = 0.0f;
    // One loop for both passes, so that the rotation is compiled once.
    for (int32_t pass = arguments.limit == 0 ? 1 : 0; pass < 2; ++pass) {
        token.forEachRotated([&](int32_t channel, float value) {
            if (pass == 0) {
                peak = fmaxf(peak, fabsf(value));
            } else if (arguments.limit == 0) {
                static_cast<T*>(arguments.y)[start + channel] = fromFloat<T>(value);
            } else {
                static_cast<int8_t*>(arguments.y)[start + channel] =
                    static_cast<int8_t>(quantize(value, quantizer));
            }
        });
        if (pass == 0) {
            quantizer = makeQuantizer(peakOfBlock(peak, partials[2]), arguments.limit);
        }
    }
    if (arguments.limit != 0 && threadIdx.x == 0) {
        arguments.tokenScales[token.token] = quantizer.scale;
    }
}

}  // namespace lrq
