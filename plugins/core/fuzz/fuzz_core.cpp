// A libFuzzer target over the C interface: fields of any value, buffers of exactly the size that
// the interface asks for. Sanitizers see what is read or written outside of them; `require` sees
// numbers that differ between two ways to compute them, and outputs written by a refused call.
//
// What a caller promises and no function can check, that a buffer without a byte count is as large
// as its dimensions say, is kept: a hostile dimension is one that must be refused.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "activations.h"
#include "c_api.h"
#include "formats.h"
#include "hadamard.h"
#include "words.h"

namespace {

constexpr int32_t kOk = static_cast<int32_t>(lrq::Status::kOk);
constexpr uint8_t kUntouched = 0x5a;

void require(bool holds, char const* what) {
    if (!holds) {
        std::fprintf(stderr, "fuzz_core: %s\n", what);
        std::abort();
    }
}

// The bytes of one input, then zeros.
class Bytes {
public:
    Bytes(uint8_t const* data, size_t size) : data_(data), size_(size) {}

    uint64_t take(int32_t count) {
        uint64_t value = 0;
        for (int32_t index = 0; index < count; ++index) {
            uint8_t const byte = at_ < size_ ? data_[at_++] : uint8_t{0};
            value = value << 8 | byte;
        }
        return value;
    }

    bool flip() { return (take(1) & 1) != 0; }

    // In first .. last, a range of at most 65536.
    int64_t between(int64_t first, int64_t last) {
        return first + static_cast<int64_t>(take(2)) % (last - first + 1);
    }

    int64_t integer() { return static_cast<int64_t>(take(8)); }

    int32_t integer32() { return static_cast<int32_t>(take(4)); }

private:
    uint8_t const* data_;
    size_t size_;
    size_t at_ = 0;
};

// An array of exactly `size` elements, so that AddressSanitizer guards both of its ends; filled
// from one seed of the input, which is what keeps inputs short.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t size) : size_(size), data_(new T[static_cast<size_t>(size)]) {
        std::memset(data_.get(), kUntouched, bytes());
    }

    Buffer(int64_t size, Bytes& input) : Buffer(size) {
        uint64_t state = input.take(4);
        for (size_t index = 0; index < bytes(); ++index) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            reinterpret_cast<uint8_t*>(data_.get())[index] = static_cast<uint8_t>(state >> 56);
        }
    }

    T* data() { return data_.get(); }
    int64_t size() const { return size_; }
    size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }
    T& operator[](int64_t index) { return data_[static_cast<size_t>(index)]; }

    bool isUntouched() const {
        auto const* const first = reinterpret_cast<uint8_t const*>(data_.get());
        for (size_t index = 0; index < bytes(); ++index) {
            if (first[index] != kUntouched) {
                return false;
            }
        }
        return true;
    }

private:
    int64_t size_;
    std::unique_ptr<T[]> data_;
};

template <class T>
bool same(Buffer<T>& left, Buffer<T>& right) {
    return left.size() == right.size() &&
           std::memcmp(left.data(), right.data(), left.bytes()) == 0;
}

// A dimension that has to be refused.
int64_t hostileDimension(Bytes& input) {
    int64_t const largest = lrq::kMaxDimension;
    switch (input.take(1) % 4) {
        case 0:
            return 0;
        case 1:
            return -1 - (input.integer() & INT64_MAX);
        case 2:
            return largest + 1 + static_cast<int64_t>(input.take(4));
        default:
            return INT64_MAX - static_cast<int64_t>(input.take(1));
    }
}

// Half of the floats are of any bits, NaN and infinity among them; half are tame.
Buffer<float> floats(int64_t size, Bytes& input, bool tame) {
    Buffer<float> values(size, input);
    for (int64_t index = 0; tame && index < size; ++index) {
        uint32_t bits = 0;
        std::memcpy(&bits, &values[index], sizeof(bits));
        values[index] = static_cast<float>(static_cast<int32_t>(bits % 2001) - 1000) / 256.0f;
    }
    return values;
}

// Exponents as a quantizer writes them in a random half of the groups: any else are rarely valid.
void tameExponents(Buffer<int8_t>& levels) {
    for (int64_t at = 0; at + 3 <= levels.size(); at += 3) {
        if ((levels[at] & 1) != 0 || (levels[0] & 2) != 0) {
            levels[at] = static_cast<int8_t>(32 + (levels[at] & 15));
            levels[at + 1] = static_cast<int8_t>(levels[at + 1] & 7);
            levels[at + 2] = static_cast<int8_t>(levels[at + 2] & 3);
        }
    }
}

void changeOneField(LrqPackedWeight& weight, Bytes& input) {
    switch (input.take(1) % 12) {
        case 0: weight.rows = input.integer(); break;
        case 1: weight.cols = input.integer(); break;
        case 2: weight.rows = input.between(-2, 300); break;
        case 3: weight.cols = input.between(-2, 300); break;
        case 4: weight.groupSize = input.flip() ? input.integer() : input.between(-2, 300); break;
        case 5: weight.format = input.flip() ? input.integer32() : (weight.format + 1) % 3; break;
        case 6: weight.layout = input.flip() ? input.integer32() : 1 - weight.layout; break;
        case 7: weight.bits = static_cast<int32_t>(input.between(-1, 9)); break;
        case 8: weight.bits = input.integer32(); break;
        case 9: weight.fractionBits = input.integer32(); break;
        case 10: weight.integerBits = input.integer32(); break;
        default: weight.codes = nullptr;
    }
}

int64_t product(int64_t left, int64_t right) {
    bool const small = left > 0 && left <= 4096 && right > 0 && right <= 4096;
    return small ? left * right : 0;
}

// What a function wrote: nothing if it refused. Its status has to have a text.
template <class T>
bool accepted(int32_t status, Buffer<T>& written) {
    require(std::strcmp(lrqStatusText(status), "unknown status") != 0, "a status has no text");
    require(status == kOk || written.isUntouched(), "a refused call wrote to its output");
    return status == kOk;
}

void packAgain(LrqPackedWeight const& weight, Buffer<uint8_t>& codes) {
    Buffer<uint8_t> packed(weight.codesBytes);
    require(lrqPackCodes(codes.data(), weight.rows, weight.cols, weight.bits, weight.layout,
                         packed.data(), packed.size()) == kOk,
            "codes that were unpacked do not pack");
    LrqPackedWeight again = weight;
    again.codes = packed.data();
    Buffer<uint8_t> codesAgain(codes.size());
    require(lrqUnpackCodes(&again, codesAgain.data()) == kOk && same(codes, codesAgain),
            "codes are not what was packed");
}

void decodeAllWays(LrqPackedWeight const& weight) {
    int64_t const size = product(weight.rows, weight.cols);
    Buffer<uint8_t> codes(size);
    if (accepted(lrqUnpackCodes(&weight, codes.data()), codes)) {
        packAgain(weight, codes);
    }
    Buffer<int8_t> byWords(size);
    Buffer<int8_t> byTable(size);
    Buffer<int8_t> byShifts(size);
    bool const inWords = accepted(lrqDecodeByWords(&weight, byWords.data()), byWords);
    if (accepted(lrqDecodeByTable(&weight, byTable.data()), byTable)) {
        require(inWords && same(byWords, byTable), "words and tables decode differently");
    }
    if (accepted(lrqDecodeByShifts(&weight, byShifts.data()), byShifts)) {
        require(inWords && same(byWords, byShifts), "words and shifts decode differently");
    }
    for (int64_t index = 0; inWords && weight.bits != 8 && index < size; ++index) {
        require(byWords[index] >= -lrq::kMaxLevel, "a weight is -128");
    }
    bool const hasTables = weight.groupSize > 0 && weight.bits >= 0 && weight.bits <= 8;
    int64_t const groups = hasTables ? product(weight.rows, weight.cols / weight.groupSize) : 0;
    Buffer<int8_t> tables(hasTables ? groups << weight.bits : 0);
    accepted(lrqExpandTables(&weight, tables.data()), tables);
}

void fuzzWeight(Bytes& input) {
    LrqPackedWeight weight{};
    weight.format = static_cast<int32_t>(input.take(1) % 3);
    bool const isInt8 = weight.format == static_cast<int32_t>(lrq::Format::kInt8);
    weight.bits = isInt8 ? 8 : static_cast<int32_t>(2 + input.take(1) % 3);
    weight.layout = isInt8 ? 0 : static_cast<int32_t>(input.take(1) % 2);
    weight.rows = input.between(1, 6);
    weight.groupSize = input.between(1, 70);
    int64_t const groups = input.between(1, 5);
    weight.cols = groups * weight.groupSize;
    weight.fractionBits = static_cast<int32_t>(input.between(0, lrq::kMaxFractionBits));
    weight.integerBits = static_cast<int32_t>(input.between(0, lrq::kMaxIntegerBits));
    int64_t const codeBytes =
        isInt8 ? weight.rows * weight.cols
               : lrq::codesBytes(static_cast<lrq::CodesLayout>(weight.layout), weight.bits,
                                 weight.rows, weight.cols);
    bool const isTwinLog = weight.format == static_cast<int32_t>(lrq::Format::kTwinLog);
    int64_t const levelBytes =
        isInt8 ? 0 : weight.rows * groups * (isTwinLog ? 6 : int64_t{1} << weight.bits);
    Buffer<uint8_t> codes(codeBytes, input);
    Buffer<int8_t> levels(levelBytes, input);
    if (isTwinLog && input.flip()) {
        tameExponents(levels);
        weight.fractionBits = 4;
        weight.integerBits = 6;
    }
    weight.codes = codes.data();
    weight.codesBytes = codes.size();
    weight.levels = levels.data();
    weight.levelsBytes = levels.size();
    if (input.flip()) {
        changeOneField(weight, input);
    }
    decodeAllWays(weight);
}

// packedBytes is true, so that only dimensions that fit the buffer can be accepted.
void fuzzPacking(Bytes& input) {
    int64_t const rows = input.flip() ? input.between(-1, 9) : input.integer();
    int64_t const cols = input.flip() ? input.between(-1, 300) : input.integer();
    int32_t const bits = static_cast<int32_t>(input.between(-1, 9));
    int32_t const layout = input.flip() ? static_cast<int32_t>(input.flip()) : input.integer32();
    Buffer<uint8_t> codes(product(rows, cols), input);
    bool const exact = input.flip() && codes.size() > 0 && lrq::hasLayout(bits);
    Buffer<uint8_t> packed(
        exact ? lrq::codesBytes(static_cast<lrq::CodesLayout>(layout & 1), bits, rows, cols)
              : input.between(0, 300));
    int32_t const status = lrqPackCodes(
        codes.data(), rows, cols, bits, layout, packed.data(), packed.size());
    accepted(status, packed);
}

double squares(Buffer<float>& values) {
    double sum = 0.0;
    for (int64_t index = 0; index < values.size(); ++index) {
        sum += static_cast<double>(values[index]) * values[index];
    }
    return sum;
}

void fuzzRotation(Bytes& input) {
    static constexpr int32_t kBlocks[] = {1,  2,  12, 20,  28,  36,  60,
                                          64, 72, 76, 108, 128, 140, 1152};
    int64_t const block = kBlocks[input.take(1) % (sizeof(kBlocks) / sizeof(kBlocks[0]))];
    int64_t const tokens = input.between(1, 3);
    int64_t const channels = block * input.between(1, 3);
    bool const tame = input.flip();
    int32_t const prologue = input.flip() ? static_cast<int32_t>(input.take(1) % 7) : 0;
    bool const isGeglu = prologue == static_cast<int32_t>(lrq::Prologue::kGeglu);
    Buffer<float> x = floats(tokens * channels * (isGeglu ? 2 : 1), input, tame);
    Buffer<float> scale = floats(tokens * channels, input, tame);
    Buffer<float> shift = floats(tokens * channels, input, tame);
    Buffer<float> signs = floats(channels, input, tame);
    for (int64_t channel = 0; tame && channel < channels; ++channel) {
        signs[channel] = signs[channel] < 0.0f ? -1.0f : 1.0f;
    }
    Buffer<float> y(tokens * channels);
    LrqTokenRotation rotation{x.data(), scale.data(), shift.data(), signs.data(), tokens, channels,
                              block,    prologue,     1e-6f};
    bool const hostile = input.flip();
    if (hostile) {
        switch (input.take(1) % 8) {
            case 0: rotation.tokens = hostileDimension(input); break;
            case 1: rotation.channels = hostileDimension(input); break;
            case 2: rotation.block = input.between(-5, 5000); break;
            case 3: rotation.block = input.integer(); break;
            case 4: rotation.prologue = static_cast<int32_t>(input.between(7, 300)); break;
            case 5: rotation.prologue = -1 - (input.integer32() & INT32_MAX); break;
            case 6: rotation.scale = nullptr; break;
            default: rotation.epsilon = floats(1, input, false)[0];
        }
    }
    bool const done = accepted(lrqRotateTokens(&rotation, y.data()), y);
    require(done || hostile, "a valid rotation was refused");
    if (done && tame && prologue == 0) {
        require(std::fabs(squares(y) - squares(x)) <= 1e-3 * squares(x), "a rotation is not one");
    }
}

void fuzzHadamard(Bytes& input) {
    int64_t const block = input.flip() ? input.between(-3, 65532) + 5 * input.flip()
                                       : input.integer();
    Buffer<int32_t> factors(3);
    bool const exists = accepted(lrqHadamardFactors(block, factors.data()), factors);
    int32_t const base = exists ? factors[0] : input.integer32();
    int32_t const order = exists ? factors[1] : input.integer32();
    bool const small = base > 0 && base <= lrq::kMaxHadamardBase;
    Buffer<int8_t> matrix(small ? int64_t{base} * base : 0);
    bool const made = accepted(
        lrqHadamardMatrix(base, order, matrix.data(), matrix.size()), matrix);
    require(made || !exists, "a factor of a size has no matrix");
    if (!made) {
        return;
    }
    require(!exists || int64_t{base} * factors[2] == block, "factors do not make the size");
    int64_t const left = input.between(0, base - 1);
    int64_t const right = input.between(0, base - 1);
    int64_t sum = 0;
    for (int64_t col = 0; col < base; ++col) {
        sum += matrix[left * base + col] * matrix[right * base + col];
    }
    require(sum == (left == right ? base : 0), "rows are not orthogonal");
}

void fuzzTokens(Bytes& input) {
    int64_t tokens = input.between(1, 3);
    int64_t cols = input.between(1, 70);
    Buffer<float> x = floats(tokens * cols, input, input.flip());
    Buffer<int8_t> quantized(x.size());
    Buffer<float> scales(tokens);
    int32_t const actBits = input.flip() ? 8 : input.flip() ? 6 : input.integer32();
    switch (input.take(1) % 4) {
        case 0: tokens = hostileDimension(input); break;
        case 1: cols = hostileDimension(input); break;
        default: break;
    }
    int32_t const status =
        lrqQuantizeTokens(x.data(), tokens, cols, actBits, quantized.data(), scales.data());
    if (!accepted(status, quantized)) {
        require(scales.isUntouched(), "a refused call wrote scales");
        return;
    }
    int32_t const limit = (1 << (actBits - 1)) - 1;
    for (int64_t index = 0; index < quantized.size(); ++index) {
        require(std::abs(quantized[index]) <= limit, "a quantized activation is out of range");
    }
    for (int64_t token = 0; token < scales.size(); ++token) {
        require(scales[token] > 0.0f, "a scale is not positive");
    }
}

void fuzzProduct(Bytes& input) {
    int64_t const tokens = input.between(1, 3);
    int64_t const rows = input.between(1, 5);
    int64_t const cols = input.between(1, 70);
    Buffer<int8_t> activations(tokens * cols, input);
    Buffer<int8_t> weight(rows * cols, input);
    bool const tame = input.flip();
    Buffer<float> tokenScales = floats(tokens, input, tame);
    Buffer<float> rowScales = floats(rows, input, tame);
    Buffer<float> bias = floats(rows, input, tame);
    Buffer<float> gate = floats(tokens * rows, input, tame);
    Buffer<float> residual = floats(tokens * rows, input, tame);
    Buffer<float> y(tokens * rows);
    LrqProduct fields{activations.data(), tokenScales.data(), weight.data(), rowScales.data(),
                      bias.data(),        gate.data(),        residual.data(), tokens,
                      rows,               cols};
    if (input.flip()) {
        fields.gate = nullptr;
        fields.residual = nullptr;
    }
    switch (input.take(1) % 10) {
        case 0: fields.tokens = hostileDimension(input); break;
        case 1: fields.rows = hostileDimension(input); break;
        case 2: fields.cols = hostileDimension(input); break;
        case 3: fields.cols = lrq::kMaxProductCols + input.between(1, 9); break;
        case 4: fields.bias = nullptr; break;
        case 5: fields.gate = nullptr; break;
        default: break;
    }
    accepted(lrqTokenProduct(&fields, y.data()), y);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size) {
    Bytes input(data, size);
    switch (input.take(1) % 8) {
        case 0: fuzzRotation(input); break;
        case 1: fuzzHadamard(input); break;
        case 2: fuzzTokens(input); break;
        case 3: fuzzProduct(input); break;
        case 4: fuzzPacking(input); break;
        default: fuzzWeight(input);
    }
    return 0;
}
