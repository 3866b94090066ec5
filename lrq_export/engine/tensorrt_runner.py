"""Run a plan of TensorRT or TensorRT-RTX: torch CUDA tensors in, torch CUDA tensors out, nothing passes the host.

A plan is bound to addresses and sizes, so each combination of input sizes has a bucket: an execution context, buffers
that the inputs are copied into on the GPU, and the CUDA graph of one run. Buckets share their scratch memory, and calls
take turns. What comes in is ordered after the caller's stream, and what the caller does next after the run.

Not yet run: no GPU was at hand. Every attribute used of NVIDIA's classes is checked against TensorRT-RTX's bindings
(tests/lrq_export/engine/test_tensorrt_runner.py), and the order of the calls against a stand-in.
"""

import importlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrq_export.engine.built import PLAN, TENSORRT, read_built
from lrq_export.engine.run_obstacle import MODULES
from lrq_export.errors import InputError, MissingError, UsageError
from lrq_export.plugins import LIBRARY, find_library

BUCKETS = 8  # combinations of sizes that are kept ready
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_loading, _loaded = threading.Lock(), set()  # plugin libraries of this process: a registry takes each once


@dataclass(frozen=True)
class Bucket:
    """What runs inputs of one combination of sizes."""

    context: Any
    inputs: dict[str, torch.Tensor]
    output: torch.Tensor
    graph: Any | None  # torch.cuda.CUDAGraph; None: the run is enqueued anew each time


class TensorRtRunner:
    """The plan in an engine's folder, on one GPU. Several threads may call it.

    Args:
        folder: of the engine; its package must have been admitted: a plan is code.
        target: tensorrt or tensorrt-rtx.
        device: the GPU; default: torch's current one.

    Raises MissingError for plugins that are not compiled, InputError for a plan that the library does not take.
    """

    def __init__(self, folder: Path, target: str, device: torch.device | None = None):
        trt = self._trt = _library(target)
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        # TensorRT-RTX compiles kernels while it runs, which a graph that is being captured would not survive.
        self._captures = target == TENSORRT
        built = read_built(folder)
        if built.plugins:
            _load_plugins(trt, target)
        self._lock, self._buckets = threading.Lock(), OrderedDict[Shapes, Bucket]()
        with torch.cuda.device(self.device):
            self._stream = torch.cuda.Stream(self.device)
            self._logger = trt.Logger(trt.Logger.WARNING)  # a runtime keeps no reference to it
            self._runtime = runtime = trt.Runtime(self._logger)
            engine = runtime.deserialize_cuda_engine((folder / PLAN).read_bytes())
            if engine is None:
                raise InputError(
                    f"{folder / PLAN}: {target} {trt.__version__} does not take it; it was built by {built.version}",
                    hint=f"build it again on this machine: lrq-export build {folder.parents[1]} --target {target}",
                )
            if engine.streamable_weights_size > 0:
                engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
            self._scratch = torch.empty(max(1, engine.device_memory_size_v2), dtype=torch.uint8, device=self.device)
        self._engine = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.input_names = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        (self._output,) = (name for name in names if name not in self.input_names)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output, float32 on the runner's device. Raises UsageError for sizes that no profile of the plan takes."""
        shapes = tuple((name, tuple(inputs[name].shape)) for name in self.input_names)
        with self._lock, torch.cuda.device(self.device):
            bucket = self._ready(shapes)
            caller = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                for name, buffer in bucket.inputs.items():
                    buffer.copy_(inputs[name], non_blocking=True)
                    if inputs[name].is_cuda:
                        inputs[name].record_stream(self._stream)
                if bucket.graph is None:
                    self._enqueue(bucket.context)
                else:
                    bucket.graph.replay()
                sample = bucket.output.to(torch.float32, copy=True)  # the next call writes into the buffer
            caller.wait_stream(self._stream)
            if sample.is_cuda:
                sample.record_stream(caller)
        return sample

    def layer_times(self, inputs: Mapping[str, torch.Tensor], runs: int) -> dict[str, list[float]]:
        """Milliseconds of each layer of the plan, one for each of `runs`.

        In a context of its own, without a CUDA graph: the profiler is told of what is enqueued, not of replays.
        """
        shapes = tuple((name, tuple(inputs[name].shape)) for name in self.input_names)
        profiler = _profiler(self._trt)
        with self._lock, torch.cuda.device(self.device):
            bucket = self._bucket(shapes, captures=False)
            context = bucket.context
            context.profiler = profiler
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for name, buffer in bucket.inputs.items():
                    buffer.copy_(inputs[name], non_blocking=True)
                for _ in range(runs):
                    self._enqueue(context)
                    self._stream.synchronize()
        return profiler.milliseconds

    def close(self) -> None:
        """Free the engine, its contexts and all memory."""
        with self._lock:
            self._stream.synchronize()
            self._buckets.clear()
            self._engine = self._runtime = self._scratch = None

    def _ready(self, shapes: Shapes) -> Bucket:
        if shapes in self._buckets:
            self._buckets.move_to_end(shapes)
        else:
            if len(self._buckets) == BUCKETS:
                self._stream.synchronize()  # it may run still
                self._buckets.popitem(last=False)
            self._buckets[shapes] = self._bucket(shapes, self._captures)
        return self._buckets[shapes]

    def _bucket(self, shapes: Shapes, captures: bool) -> Bucket:
        trt, engine, stream = self._trt, self._engine, self._stream
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        context.nvtx_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY  # all that a plan tells would slow each run
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        context.set_optimization_profile_async(self._profile(shapes), stream.cuda_stream)
        buffers = {}
        for name, shape in shapes:
            buffers[name] = torch.zeros(shape, dtype=self._dtype(name), device=self.device)
            context.set_input_shape(name, shape)
            context.set_tensor_address(name, buffers[name].data_ptr())
        unknown = context.infer_shapes()
        if unknown:
            raise UsageError(f"the plan does not know the sizes of {', '.join(unknown)}", hint="build it again")
        output = torch.empty(
            tuple(context.get_tensor_shape(self._output)), dtype=self._dtype(self._output), device=self.device
        )
        context.set_tensor_address(self._output, output.data_ptr())
        stream.wait_stream(torch.cuda.current_stream(self.device))  # of the zeros
        with torch.cuda.stream(stream):
            self._enqueue(context)  # the first run allocates, which a capture must not
        return Bucket(context, buffers, output, self._captured(context) if captures else None)

    def _captured(self, context: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._enqueue(context)
        return graph

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise RuntimeError("TensorRT did not enqueue the plan; what it logged above says why")

    def _profile(self, shapes: Shapes) -> int:
        """The first optimization profile that takes inputs of these sizes."""
        engine = self._engine
        for index in range(engine.num_optimization_profiles):
            ranges = {name: engine.get_tensor_profile_shape(name, index) for name, _ in shapes}
            if all(_within(shape, ranges[name]) for name, shape in shapes):
                return index
        told = ", ".join(f"{name} {shape}" for name, shape in shapes)
        raise UsageError(
            f"no optimization profile of the plan takes {told}",
            hint="build the engine with engine.profiles for these sizes, or load the package with target='onnxruntime'",
        )

    def _dtype(self, name: str) -> torch.dtype:
        trt, engine = self._trt, self._engine
        known = {
            trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT32: torch.int32, trt.DataType.INT64: torch.int64, trt.DataType.BOOL: torch.bool,
        }  # fmt: skip
        return known[engine.get_tensor_dtype(name)]


def _library(target: str) -> Any:
    try:
        return importlib.import_module(MODULES[target])
    except (ImportError, OSError) as error:  # the latter: a library of the wheel does not load
        raise MissingError(
            f"{target}: {MODULES[target]} cannot be imported: {error}", hint="install it again, or load onnxruntime"
        ) from error


def _within(shape: tuple[int, ...], ranges: Any) -> bool:
    least, _, most = ranges
    return all(low <= size <= high for low, size, high in zip(tuple(least), shape, tuple(most), strict=True))


def _profiler(trt: Any) -> Any:
    """What TensorRT tells the time of every layer, of a class in a library that is found at run time."""

    class LayerTimes(trt.IProfiler):
        def __init__(self):
            trt.IProfiler.__init__(self)  # pybind11 takes no instance whose base was not made
            self.milliseconds: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.milliseconds.setdefault(layer_name, []).append(ms)

    return LayerTimes()


def _load_plugins(trt: Any, target: str) -> None:
    """Load the compiled plugins into the library's registry, once a process; never any that a package brings along."""
    library = find_library()
    if library is None:
        raise MissingError(f"{target}: {LIBRARY} is not compiled", hint="run lrq-export plugins build")
    with _loading:
        if (target, library) not in _loaded:
            registry = trt.get_plugin_registry()
            if registry.load_library(str(library)) is None:
                raise MissingError(
                    f"{library}: {target} {trt.__version__} does not load it", hint="run lrq-export plugins build"
                )
            _loaded.add((target, library))
