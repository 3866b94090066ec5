// Rotations of tokens, with what is fused before them: graphs/ops/rotated.py and its siblings.
#include <cmath>

#include "activations.h"
#include "c_api.h"
#include "c_api_checks.h"
#include "hadamard.h"

namespace lrq {
namespace {

bool isPrologue(int32_t prologue) {
    return prologue >= static_cast<int32_t>(Prologue::kNone) &&
           prologue <= static_cast<int32_t>(Prologue::kGeglu);
}

Status checkRotation(LrqTokenRotation const* rotation, float const* y) {
    if (rotation == nullptr || y == nullptr || rotation->x == nullptr ||
        rotation->signs == nullptr) {
        return Status::kNullPointer;
    }
    if (!isPrologue(rotation->prologue)) {
        return Status::kBadFormat;
    }
    if (!inRange(rotation->tokens) || !inRange(rotation->channels)) {
        return Status::kBadSize;
    }
    HadamardFactors factors{};
    if (!factorizeHadamard(rotation->block, &factors) ||
        rotation->channels % rotation->block != 0) {
        return Status::kBadBlock;
    }
    if (!isNorm(static_cast<Prologue>(rotation->prologue))) {
        return Status::kOk;
    }
    if (rotation->scale == nullptr || rotation->shift == nullptr) {
        return Status::kNullPointer;
    }
    bool const valid = std::isfinite(rotation->epsilon) && rotation->epsilon >= 0.0f;
    return valid ? Status::kOk : Status::kBadValue;
}

// Sums of a token are in double: what is left of the error is the last rounding.
double meanOf(float const* x, int64_t channels) {
    double sum = 0.0;
    for (int64_t channel = 0; channel < channels; ++channel) {
        sum += x[channel];
    }
    return sum / static_cast<double>(channels);
}

double meanSquareOf(float const* x, int64_t channels) {
    double sum = 0.0;
    for (int64_t channel = 0; channel < channels; ++channel) {
        sum += static_cast<double>(x[channel]) * x[channel];
    }
    return sum / static_cast<double>(channels);
}

// y (channels,) = norm(x) scale + shift of one token.
void normalizeToken(LrqTokenRotation const& rotation, int64_t token, float* y) {
    int64_t const channels = rotation.channels;
    float const* const x = rotation.x + token * channels;
    float const* const scale = rotation.scale + token * channels;
    float const* const shift = rotation.shift + token * channels;
    bool const centred = static_cast<Prologue>(rotation.prologue) == Prologue::kLayerNorm;
    float const mean = centred ? static_cast<float>(meanOf(x, channels)) : 0.0f;
    for (int64_t channel = 0; channel < channels; ++channel) {
        y[channel] = x[channel] - mean;
    }
    float const norm =
        inverseNorm(static_cast<float>(meanSquareOf(y, channels)), rotation.epsilon);
    for (int64_t channel = 0; channel < channels; ++channel) {
        y[channel] = y[channel] * norm * scale[channel] + shift[channel];
    }
}

// y (channels,) = activation(x) of one token.
void activateToken(LrqTokenRotation const& rotation, int64_t token, float* y) {
    int64_t const channels = rotation.channels;
    Prologue const prologue = static_cast<Prologue>(rotation.prologue);
    int64_t const parts = prologue == Prologue::kGeglu ? 2 : 1;
    float const* const x = rotation.x + token * parts * channels;
    for (int64_t channel = 0; channel < channels; ++channel) {
        switch (prologue) {
            case Prologue::kGelu:
                y[channel] = gelu(x[channel]);
                break;
            case Prologue::kGeluTanh:
                y[channel] = geluTanh(x[channel]);
                break;
            case Prologue::kSilu:
                y[channel] = silu(x[channel]);
                break;
            case Prologue::kGeglu:
                y[channel] = geglu(x[channel], x[channels + channel]);
                break;
            default:
                y[channel] = x[channel];
        }
    }
}

void rotateToken(LrqTokenRotation const& rotation, HadamardFactors const& factors, float* y) {
    float scratch[kMaxHadamardBase];
    float const scale =
        static_cast<float>(1.0 / std::sqrt(static_cast<double>(rotation.block)));
    for (int64_t channel = 0; channel < rotation.channels; ++channel) {
        y[channel] *= rotation.signs[channel];
    }
    for (int64_t start = 0; start < rotation.channels; start += rotation.block) {
        hadamardTransform(y + start, factors, scale, scratch);
    }
}

}  // namespace
}  // namespace lrq

int32_t lrqHadamardFactors(int64_t block, int32_t* factors) {
    if (factors == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    lrq::HadamardFactors found{};
    if (!lrq::factorizeHadamard(block, &found)) {
        return lrq::code(lrq::Status::kBadBlock);
    }
    factors[0] = found.base.size;
    factors[1] = found.base.order;
    factors[2] = found.power;
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqHadamardMatrix(int32_t base, int32_t order, int8_t* matrix, int64_t matrixEntries) {
    if (matrix == nullptr) {
        return lrq::code(lrq::Status::kNullPointer);
    }
    if (!lrq::isHadamardBase(base, order)) {
        return lrq::code(lrq::Status::kBadBlock);
    }
    if (matrixEntries != int64_t{base} * base) {
        return lrq::code(lrq::Status::kBadSize);
    }
    lrq::HadamardBase const made = lrq::makeHadamardBase(base, order);
    for (int32_t row = 0; row < base; ++row) {
        for (int32_t col = 0; col < base; ++col) {
            matrix[row * base + col] = static_cast<int8_t>(lrq::hadamardEntry(made, row, col));
        }
    }
    return lrq::code(lrq::Status::kOk);
}

int32_t lrqRotateTokens(LrqTokenRotation const* rotation, float* y) {
    lrq::Status const status = lrq::checkRotation(rotation, y);
    if (status != lrq::Status::kOk) {
        return lrq::code(status);
    }
    lrq::HadamardFactors factors{};
    lrq::factorizeHadamard(rotation->block, &factors);
    for (int64_t token = 0; token < rotation->tokens; ++token) {
        float* const row = y + token * rotation->channels;
        if (lrq::isNorm(static_cast<lrq::Prologue>(rotation->prologue))) {
            lrq::normalizeToken(*rotation, token, row);
        } else {
            lrq::activateToken(*rotation, token, row);
        }
        lrq::rotateToken(*rotation, factors, row);
    }
    return lrq::code(lrq::Status::kOk);
}
