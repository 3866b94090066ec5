// A library of its own, one for each major version of TensorRT, that registers all plugins as soon
// as it is loaded: for programs that merely dlopen it (trtexec --staticPlugins, polygraphy
// --plugins, ONNX Runtime's trt_extra_plugin_lib_paths). IPluginRegistry lies differently in memory
// from one major version to the next, which is why this is compiled against the headers of each.
#include <cstdio>

#include "../core/export.h"
#include "NvInfer.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

bool registerAll() noexcept {
    nvinfer1::IPluginRegistry* const registry = getPluginRegistry();
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
    bool complete = registry != nullptr;
    for (int32_t index = 0; complete && index < count; ++index) {
        complete = registry->registerCreator(*creators[index], "");
    }
    if (!complete) {
        std::fprintf(stderr, "lrq: TensorRT refused the plugins; were they loaded before?\n");
    }
    return complete;
}

}  // namespace

extern "C" LRQ_EXPORT bool const lrqPluginsRegistered = registerAll();
