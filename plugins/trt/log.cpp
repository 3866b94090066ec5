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

// The order of virtual functions is the layout.
namespace version10 {

struct Logger {
    virtual void log(Severity severity, char const* message) noexcept = 0;
    virtual ~Logger() = default;
};
struct Finder {
    virtual Logger* findLogger() = 0;
    virtual ~Finder() = default;
};

}  // namespace version10

namespace version11 {

struct Info {
    char const* kind;
    int32_t major;
    int32_t minor;
};
struct Versioned {
    virtual int32_t getAPILanguage() const noexcept = 0;
    virtual Info getInterfaceInfo() const noexcept = 0;
    virtual ~Versioned() noexcept = default;
};
struct Logger : Versioned {
    virtual void log(Severity severity, char const* message) noexcept = 0;
};
struct Finder : Versioned {
    virtual Logger* findLogger() = 0;
};

}  // namespace version11

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

template <typename Finder>
bool tell(void* finder, Severity severity, std::string const& message) {
    auto* const logger = static_cast<Finder*>(finder)->findLogger();
    if (logger != nullptr) {
        logger->log(severity, message.c_str());
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
        bool told = false;
        if (finder != nullptr && version != kUnknownVersion) {
            told = version == 10 ? tell<version10::Finder>(finder, severity, text)
                                 : tell<version11::Finder>(finder, severity, text);
        }
        if (!told) {
            std::fprintf(stderr, "%s\n", text.c_str());
        }
    } catch (...) {  // a message that cannot be delivered must not end the process
    }
}

}  // namespace lrq::trt
