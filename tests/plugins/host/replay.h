// How a plugin's work gets onto the device: at once, or captured in a CUDA graph that is then replayed.
#pragma once

#include <functional>

#include "memory.h"

#include <cuda_runtime_api.h>

using Enqueue = std::function<int32_t(cudaStream_t)>;
using Replay = std::function<int32_t(Enqueue const&)>;

inline int32_t runNow(Enqueue const& enqueue) {
    return enqueue(nullptr);
}

#if defined(LRQ_HOST_ON_GPU)

// What a capture made, freed with it.
struct CapturedGraph {
    cudaStream_t stream{nullptr};
    cudaGraph_t graph{nullptr};
    cudaGraphExec_t executable{nullptr};

    CapturedGraph() = default;
    CapturedGraph(CapturedGraph const&) = delete;
    ~CapturedGraph() {
        if (executable != nullptr) {
            cudaGraphExecDestroy(executable);
        }
        if (graph != nullptr) {
            cudaGraphDestroy(graph);
        }
        if (stream != nullptr) {
            cudaStreamDestroy(stream);
        }
    }
};

// The status of enqueue, or of a capture that it broke. The strictest mode of capture: whatever might
// wait or allocate breaks it. The graph is launched twice; capturing alone computes nothing.
inline int32_t replayed(Enqueue const& enqueue) {
    CapturedGraph captured;
    needCuda(cudaStreamCreateWithFlags(&captured.stream, cudaStreamNonBlocking));
    needCuda(cudaDeviceSynchronize());  // inputs and sentinels were written on another stream
    needCuda(cudaStreamBeginCapture(captured.stream, cudaStreamCaptureModeGlobal));
    int32_t const status = enqueue(captured.stream);
    cudaError_t const ended = cudaStreamEndCapture(captured.stream, &captured.graph);
    if (status != 0 || ended != cudaSuccess) {
        static_cast<void>(cudaGetLastError());
        return status != 0 ? status : static_cast<int32_t>(ended);
    }
    needCuda(cudaGraphInstantiateWithFlags(&captured.executable, captured.graph, 0));
    needCuda(cudaGraphLaunch(captured.executable, captured.stream));
    needCuda(cudaGraphLaunch(captured.executable, captured.stream));
    needCuda(cudaStreamSynchronize(captured.stream));
    return 0;
}

#endif
