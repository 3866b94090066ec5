// conformance LIBRARY CASES             every case; prints what fails, exits 1 if anything does
// conformance LIBRARY CASES --mutants   every wrong version of a plugin; prints which case and
// check caught each
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "conformance.h"
#include "mutants.h"

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginCreatorV3One;

// What TensorRT's library exports: the plugins ask it which of the interfaces that they call it
// has.
extern "C" __attribute__((visibility("default"))) int32_t getInferLibMajorVersion() noexcept {
    return NV_TENSORRT_MAJOR;
}

namespace {

// As IPluginRegistry::loadLibrary does it.
std::map<std::string, IPluginCreatorV3One*> load(char const* path,
                                                 nvinfer1::ILoggerFinder* finder) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw std::runtime_error(dlerror());
    }
    using SetFinder = void(nvinfer1::ILoggerFinder*);
    using GetCreators = IPluginCreatorInterface* const*(int32_t&);
    auto* const setFinder = reinterpret_cast<SetFinder*>(dlsym(library, "setLoggerFinder"));
    auto* const getCreators = reinterpret_cast<GetCreators*>(dlsym(library, "getCreators"));
    if (setFinder == nullptr || getCreators == nullptr) {
        throw std::runtime_error("the library lacks setLoggerFinder or getCreators");
    }
    setFinder(finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    std::map<std::string, IPluginCreatorV3One*> named;
    for (int32_t index = 0; index < count; ++index) {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[index]);
        named[creator->getPluginName()] = creator;
    }
    return named;
}

// "" if the case passes, else what fails.
std::string outcome(IPluginCreatorV3One* creator, Case const& each, Logger& logger,
                    TimingIds& timings) {
    if (creator == nullptr) {
        return "has no creator";
    }
    try {
        walk(*creator, each, logger, timings);
        return "";
    } catch (Failure const& failure) {
        return failure.what();
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: conformance LIBRARY CASES [--mutants]\n");
        return 2;
    }
    try {
        Logger logger;
        LoggerFinder finder(logger);
        auto const creators = load(argv[1], &finder);
        std::vector<Case> const cases = readCases(argv[2]);
        auto const creatorOf = [&](Case const& each) -> IPluginCreatorV3One* {
            auto const found = creators.find(each.op);
            return found == creators.end() ? nullptr : found->second;
        };
        int failed = 0;
        if (argc > 3 && std::strcmp(argv[3], "--mutants") == 0) {
            for (Mutant const& mutant : kMutants) {
                std::string caught;
                TimingIds timings;
                for (Case const& each : cases) {
                    IPluginCreatorV3One* const right = creatorOf(each);
                    if (caught.empty() && right != nullptr) {
                        MutantCreator wrong(*right, mutant.kind);
                        std::string const what = outcome(&wrong, each, logger, timings);
                        caught = what.empty() ? "" : each.label + ": " + what;
                    }
                }
                std::printf("%s %s: %s\n", caught.empty() ? "MISSED" : "caught", mutant.name,
                            caught.c_str());
                failed += caught.empty();
            }
        } else {
            TimingIds timings;
            for (Case const& each : cases) {
                std::string const what = outcome(creatorOf(each), each, logger, timings);
                if (!what.empty()) {
                    std::printf("FAILED %s: %s\n", each.label.c_str(), what.c_str());
                    ++failed;
                }
            }
            std::printf("%zu cases, %d failed\n", cases.size(), failed);
        }
        return failed == 0 ? 0 : 1;
    } catch (std::exception const& error) {
        std::fprintf(stderr, "conformance: %s\n", error.what());
        return 2;
    }
}
