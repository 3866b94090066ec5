// What a program that uses TensorRT has loaded: getPluginRegistry, whose registry keeps the names
// it is given.
#include <string>

#include "NvInfer.h"

using namespace nvinfer1;

namespace {

std::string names;

class Registry : public IPluginRegistry {
public:
#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator&, AsciiChar const*) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override {
        return nullptr;
    }
    IPluginCreator* getPluginCreator(AsciiChar const*, AsciiChar const*,
                                     AsciiChar const*) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#endif
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    bool registerCreator(IPluginCreatorInterface& creator,
                         AsciiChar const* space) noexcept override {
        names += static_cast<IPluginCreatorV3One&>(creator).getPluginName() + std::string("|") +
                 space + "\n";
        return true;
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override {
        return nullptr;
    }
    IPluginCreatorInterface* getCreator(AsciiChar const*, AsciiChar const*,
                                        AsciiChar const*) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
#if NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 16)
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override {
        return nullptr;
    }
#endif
};

}  // namespace

extern "C" __attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept {
    static Registry registry;
    return &registry;
}

// A line for each creator that was registered: its name, and the namespace behind a bar.
extern "C" __attribute__((visibility("default"))) char const* registeredNames() {
    return names.c_str();
}
