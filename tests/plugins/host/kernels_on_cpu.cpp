// kernels.h on host memory, from the loops of plugins/core: what the plugins call where there is no
// GPU. Takes its pointers to be the host's, and refuses what the CUDA library refuses.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "activations.h"
#include "decode.h"
#include "hadamard.h"
#include "kernels.h"
#include "words.h"

namespace {

constexpr int64_t kAlignment = 256;

thread_local std::string lastError;

int32_t refuse(int32_t status, std::string const& message) {
    lastError = message;
    return status;
}

int32_t refuse(lrq::Status status, std::string const& message) {
    return refuse(static_cast<int32_t>(status), message);
}

float load(void const* data, int32_t type, int64_t index) {
    switch (type) {
        case LRQ_HALF:
            return __half2float(static_cast<__half const*>(data)[index]);
        case LRQ_BFLOAT16:
            return __bfloat162float(static_cast<__nv_bfloat16 const*>(data)[index]);
        default:
            return static_cast<float const*>(data)[index];
    }
}

void store(void* data, int32_t type, int64_t index, float value) {
    switch (type) {
        case LRQ_HALF:
            static_cast<__half*>(data)[index] = __float2half(value);
            break;
        case LRQ_BFLOAT16:
            static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16(value);
            break;
        default:
            static_cast<float*>(data)[index] = value;
    }
}

// The element of one channel for one token.
float modulation(LrqModulation const& from, LrqTokens const& tokens, int32_t type, int64_t token,
                 int64_t channel) {
    int64_t const outer = token / tokens.innerCount;
    int64_t const inner = token % tokens.innerCount;
    return load(from.data, type, outer * from.outerStride + inner * from.innerStride + channel);
}

int64_t count(LrqTokens const& tokens) {
    return tokens.outerCount * tokens.innerCount;
}

// One token before it is rotated.
std::vector<float> prologue(LrqRotation const& rotation, int64_t token) {
    auto const kind = static_cast<lrq::Prologue>(rotation.prologue);
    int64_t const channels = rotation.channels;
    int64_t const width = kind == lrq::Prologue::kGeglu ? 2 * channels : channels;
    std::vector<float> x(static_cast<size_t>(width));
    for (int64_t channel = 0; channel < width; ++channel) {
        x[channel] = load(rotation.x, rotation.type, token * width + channel);
    }
    if (lrq::isNorm(kind)) {
        double mean = 0;
        for (float value : x) {
            mean += kind == lrq::Prologue::kLayerNorm ? value / static_cast<double>(channels) : 0;
        }
        double square = 0;
        for (float& value : x) {
            value -= static_cast<float>(mean);
            square += static_cast<double>(value) * value / static_cast<double>(channels);
        }
        float const norm = lrq::inverseNorm(static_cast<float>(square), rotation.epsilon);
        for (int64_t channel = 0; channel < channels; ++channel) {
            LrqTokens const& tokens = rotation.tokens;
            x[channel] *= norm;
            x[channel] *= modulation(rotation.scale, tokens, rotation.type, token, channel);
            x[channel] += modulation(rotation.shift, tokens, rotation.type, token, channel);
        }
        return x;
    }
    for (int64_t channel = 0; channel < channels; ++channel) {
        float& value = x[channel];
        switch (kind) {
            case lrq::Prologue::kGelu:
                value = lrq::gelu(value);
                break;
            case lrq::Prologue::kGeluTanh:
                value = lrq::geluTanh(value);
                break;
            case lrq::Prologue::kSilu:
                value = lrq::silu(value);
                break;
            case lrq::Prologue::kGeglu:
                value = lrq::geglu(value, x[channels + channel]);
                break;
            default:
                break;
        }
    }
    x.resize(static_cast<size_t>(channels));
    return x;
}

void rotate(std::vector<float>& x, lrq::HadamardFactors const& factors) {
    int32_t const block = factors.base.size * factors.power;
    std::vector<float> scratch(static_cast<size_t>(factors.base.size));
    float const scale = 1.0f / std::sqrt(static_cast<float>(block));
    for (size_t first = 0; first < x.size(); first += block) {
        lrq::hadamardTransform(x.data() + first, factors, scale, scratch.data());
    }
}

// q and s of one token.
float quantize(std::vector<float> const& x, int32_t actBits, int8_t* quantized) {
    int32_t const limit = lrq::activationLimit(actBits);
    float peak = 0;
    for (float value : x) {
        peak = std::fmax(peak, std::fabs(value));
    }
    float const scale = lrq::tokenScale(peak, limit);
    for (size_t col = 0; col < x.size(); ++col) {
        quantized[col] = lrq::quantizeActivation(x[col], scale, limit);
    }
    return scale;
}

int32_t decodeOne(LrqWeight const& weight, lrq::Mantissas const& mantissas, int64_t row,
                  int64_t col) {
    if (weight.format == LRQ_INT8) {
        return static_cast<int8_t const*>(weight.codes)[row * weight.cols + col];
    }
    auto const* codes = static_cast<uint8_t const*>(weight.codes);
    int32_t const code = weight.layout == LRQ_WORDS
                             ? lrq::readWordsCode(codes, weight.bits, weight.cols, row, col)
                             : lrq::readCode(codes, weight.bits, weight.cols, row, col);
    int64_t const group = (row * weight.cols + col) / weight.groupSize;
    if (weight.format == LRQ_CODEBOOK) {
        return weight.levels[(group << weight.bits) + code];
    }
    auto const* exponents = reinterpret_cast<lrq::GroupExponents const*>(weight.levels);
    return lrq::decodeWeightClamped(exponents[group], code, weight.bits, mantissas);
}

int64_t rounded(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int64_t decodedBytes(LrqLinear const& linear) {
    bool const inWorkspace = linear.decoded == nullptr && linear.weight.format != LRQ_INT8;
    return inWorkspace ? rounded(linear.weight.rows * linear.weight.cols) : 0;
}

}  // namespace

extern "C" {

int32_t lrqRotate(LrqRotation const* rotation, void*) {
    lrq::HadamardFactors factors{};
    if (rotation->x == nullptr || rotation->y == nullptr) {
        return refuse(lrq::Status::kNullPointer, "x or y is null");
    }
    if (!lrq::factorizeHadamard(rotation->block, &factors) ||
        rotation->channels % rotation->block != 0) {
        return refuse(lrq::Status::kBadSize, "the block has no matrix, or does not divide x");
    }
    for (int64_t token = 0; token < count(rotation->tokens); ++token) {
        std::vector<float> x = prologue(*rotation, token);
        for (int64_t channel = 0; rotation->signs && channel < rotation->channels; ++channel) {
            x[channel] *= load(rotation->signs, rotation->type, channel);
        }
        rotate(x, factors);
        for (int64_t channel = 0; channel < rotation->channels; ++channel) {
            int64_t const index = token * rotation->channels + channel;
            store(rotation->y, rotation->type, index, x[channel]);
        }
    }
    return 0;
}

int32_t lrqDecode(LrqWeight const* weight, int8_t* decoded, void*) {
    if (weight->codes == nullptr || decoded == nullptr ||
        (weight->levels == nullptr) != (weight->format == LRQ_INT8)) {
        return refuse(lrq::Status::kNullPointer, "codes, levels or decoded is null");
    }
    lrq::Mantissas const mantissas = lrq::makeMantissas(weight->fractionBits, weight->integerBits);
    for (int64_t row = 0; row < weight->rows; ++row) {
        for (int64_t col = 0; col < weight->cols; ++col) {
            int32_t const value = decodeOne(*weight, mantissas, row, col);
            decoded[row * weight->cols + col] = static_cast<int8_t>(value);
        }
    }
    return 0;
}

int32_t lrqDequantize(LrqWeight const* weight, float const* scale, float* dequantized, void*) {
    std::vector<int8_t> decoded(static_cast<size_t>(weight->rows * weight->cols));
    int32_t const status = lrqDecode(weight, decoded.data(), nullptr);
    for (size_t index = 0; status == 0 && index < decoded.size(); ++index) {
        dequantized[index] = scale[index / weight->cols] * decoded[index];
    }
    return status;
}

// The decoded weight, then the codes of x, then the scales of its tokens.
int64_t lrqLinearWorkspace(LrqLinear const* linear) {
    if (linear->x == nullptr || linear->y == nullptr || linear->rowScales == nullptr) {
        refuse(lrq::Status::kNullPointer, "x, y or the scales of rows are null");
        return -1;
    }
    int64_t const tokens = count(linear->tokens);
    return decodedBytes(*linear) + rounded(tokens * linear->weight.cols) +
           rounded(tokens * static_cast<int64_t>(sizeof(float)));
}

int32_t lrqLinear(LrqLinear const* linear, void* workspace, int64_t workspaceBytes, void*) {
    int64_t const needed = lrqLinearWorkspace(linear);
    if (needed < 0 || workspaceBytes < needed || workspace == nullptr) {
        return refuse(LRQ_BAD_WORKSPACE, "the workspace is too small");
    }
    int64_t const rows = linear->weight.rows;
    int64_t const cols = linear->weight.cols;
    int64_t const tokens = count(linear->tokens);
    auto* const bytes = static_cast<int8_t*>(workspace);
    int8_t const* weight = linear->decoded;
    if (weight == nullptr && linear->weight.format == LRQ_INT8) {
        weight = static_cast<int8_t const*>(linear->weight.codes);
    } else if (weight == nullptr) {
        int32_t const status = lrqDecode(&linear->weight, bytes, nullptr);
        if (status != 0) {
            return status;
        }
        weight = bytes;
    }
    int8_t* const quantized = bytes + decodedBytes(*linear);
    auto* const scales = reinterpret_cast<float*>(quantized + rounded(tokens * cols));
    lrq::HadamardFactors factors{};
    for (int64_t token = 0; token < tokens; ++token) {
        std::vector<float> x(static_cast<size_t>(cols));
        for (int64_t col = 0; col < cols; ++col) {
            x[col] = load(linear->x, linear->type, token * cols + col);
        }
        if (linear->block > 1 && lrq::factorizeHadamard(linear->block, &factors)) {
            rotate(x, factors);
        }
        scales[token] = quantize(x, linear->actBits, quantized + token * cols);
        for (int64_t row = 0; row < rows; ++row) {
            int32_t sum = 0;
            for (int64_t col = 0; col < cols; ++col) {
                sum += quantized[token * cols + col] * weight[row * cols + col];
            }
            float const bias = linear->bias == nullptr ? 0.0f : linear->bias[row];
            float y = lrq::dequantizeSum(sum, scales[token], linear->rowScales[row], bias);
            if (linear->gate.data != nullptr) {
                y *= modulation(linear->gate, linear->tokens, linear->type, token, row);
                y += load(linear->residual, linear->type, token * rows + row);
            }
            store(linear->y, linear->type, token * rows + row, y);
        }
    }
    return 0;
}

char const* lrqKernelsError(void) {
    return lastError.c_str();
}

}  // extern "C"
