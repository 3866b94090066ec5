// Feeds a libFuzzer target seeded random bytes where there is no libFuzzer, which comes with clang:
//
//     fuzz_core [-runs=N] [-max_total_time=SECONDS] [-seed=S]
//
// The bytes of a run depend on seed + its number alone: `-seed=S+N -runs=1` repeats run N.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size);

namespace {

constexpr int64_t kProgress = 1 << 14;
constexpr uint64_t kMaxSize = 128;

// SplitMix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014).
uint64_t nextRandom(uint64_t& state) {
    state += 0x9e3779b97f4a7c15u;
    uint64_t mixed = state;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
    return mixed ^ mixed >> 31;
}

std::vector<uint8_t> bytesOf(uint64_t run) {
    uint64_t state = run * 0xd1342543de82ef95u;
    std::vector<uint8_t> bytes(nextRandom(state) % (kMaxSize + 1));
    for (uint8_t& byte : bytes) {
        byte = static_cast<uint8_t>(nextRandom(state));
    }
    return bytes;
}

// The number behind `name`, or `value` if the argument is another one.
int64_t option(char const* argument, char const* name, int64_t value) {
    size_t const length = std::strlen(name);
    return std::strncmp(argument, name, length) == 0 ? std::atoll(argument + length) : value;
}

}  // namespace

int main(int count, char** arguments) {
    int64_t runs = INT64_MAX;
    int64_t seconds = INT32_MAX;
    int64_t seed = 0;
    for (int index = 1; index < count; ++index) {
        runs = option(arguments[index], "-runs=", runs);
        seconds = option(arguments[index], "-max_total_time=", seconds);
        seed = option(arguments[index], "-seed=", seed);
    }
    auto const end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    int64_t run = 0;
    for (; run < runs && std::chrono::steady_clock::now() < end; ++run) {
        if (run % kProgress == 0) {
            std::fprintf(stderr, "run %lld of seed %lld\n", static_cast<long long>(run),
                         static_cast<long long>(seed));
        }
        std::vector<uint8_t> const bytes = bytesOf(static_cast<uint64_t>(seed + run));
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    std::fprintf(stderr, "%lld runs without a finding\n", static_cast<long long>(run));
    return 0;
}
