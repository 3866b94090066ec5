// The logger and its finder are the two interfaces of TensorRT that we call and that lie
// differently in memory in TensorRT 10 than in 11, where they became versioned; TensorRT-RTX 1.7
// has them as 11 does. One binary serves all of them, so their headers are not used here: the
// library that the finder belongs to is asked for its version.
#include "log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

namespace lrq::trt {
namespace {

// Where ILoggerFinder::findLogger and ILogger::log are among the virtual functions of their class:
// first in TensorRT 10; later behind getAPILanguage, getInterfaceInfo and the two destructors.
constexpr int32_t kSlotIn10 = 0;
constexpr int32_t kSlotSince11 = 4;

constexpr int32_t kUnknownVersion = -1;

std::atomic<void*> loggerFinder{nullptr};
std::atomic<int32_t> finderVersion{kUnknownVersion};  // major; 1 is TensorRT-RTX

// What getInferLibMajorVersion of the library that holds this object's virtual functions returns.
// Libraries of pip packages are in no global scope, so the library is named.
int32_t majorVersionOf(void* object) {
    Dl_info home{};
    if (object == nullptr || dladdr(*static_cast<void**>(object), &home) == 0) {
        return kUnknownVersion;
    }
    for (char const* name : {static_cast<char const*>(nullptr), home.dli_fname}) {
        void* const library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
        void* const symbol =
            library == nullptr ? nullptr : dlsym(library, "getInferLibMajorVersion");
        Dl_info of{};
        bool const found =
            symbol != nullptr && dladdr(symbol, &of) != 0 && of.dli_fbase == home.dli_fbase;
        int32_t const version =
            found ? reinterpret_cast<int32_t (*)() noexcept>(symbol)() : kUnknownVersion;
        if (library != nullptr) {
            dlclose(library);
        }
        if (found) {
            return version;
        }
    }
    return kUnknownVersion;
}

// A virtual function by its slot. A class declared for the purpose would not do: the compiler,
// which sees nobody derive from it, takes such a call to be impossible.
template <typename Function>
Function* virtualFunction(void* object, int32_t slot) {
    return reinterpret_cast<Function*>((*static_cast<void***>(object))[slot]);
}

bool tell(void* finder, int32_t slot, Severity severity, char const* message) {
    void* const logger = virtualFunction<void*(void*)>(finder, slot)(finder);
    if (logger != nullptr) {
        using Log = void(void*, Severity, char const*);
        virtualFunction<Log>(logger, slot)(logger, severity, message);
    }
    return logger != nullptr;
}

}  // namespace

void setFinder(void* finder) noexcept {
    finderVersion = majorVersionOf(finder);
    loggerFinder = finder;
}

void log(Severity severity, std::string const& message) noexcept {
    try {
        std::string const text = "lrq: " + message;
        void* const finder = loggerFinder;
        int32_t const version = finderVersion;
        bool const told =
            finder != nullptr && version != kUnknownVersion &&
            tell(finder, version == 10 ? kSlotIn10 : kSlotSince11, severity, text.c_str());
        if (!told) {
            std::fprintf(stderr, "%s\n", text.c_str());
        }
    } catch (...) {  // a message that cannot be delivered must not end the process
    }
}

}  // namespace lrq::trt
