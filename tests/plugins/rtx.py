"""TensorRT-RTX with the lrq plugins: its parser and builder run without a GPU, and never call enqueue."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import tensorrt_rtx as trt
import tensorrt_rtx_libs
from onnx import TensorProto

from graphs.traced import TracedGraph
from lrq_export.onnx_file import WeightTensor

BITS = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT8: 8,
    TensorProto.INT4: 4,
}


def name_without_version(folder: Path) -> None:
    """Let the parser find TensorRT-RTX by the name it asks for: libtensorrt_rtx.so, without a version.

    The wheel ships libtensorrt_rtx.so.1 only, and a parser that meets a plugin and does not find it ends the process.
    A library of that name that does nothing but need the real one will do, once it is loaded. (In an installation, a
    link beside the real one does as well.)
    """
    real = Path(tensorrt_rtx_libs.__file__).parent / "libtensorrt_rtx.so.1"
    library = folder / "libtensorrt_rtx.so"
    needs = ["-Wl,--no-as-needed", str(real), f"-Wl,-rpath,{real.parent}"]
    command = ["g++", "-shared", "-x", "c++", "/dev/null", "-x", "none", f"-Wl,-soname,{library.name}", *needs]
    subprocess.run([*command, "-o", str(library)], check=True)
    ctypes.CDLL(str(library))


@contextmanager
def loaded(library: Path) -> Iterator[trt.IPluginRegistry]:
    """The library's plugins in the registry, for a while: other tests want their absence."""
    registry = trt.get_plugin_registry()
    ctypes.CDLL(str(library))  # registers nothing, and keeps the code in memory once the registry lets go of it
    handle = registry.load_library(str(library))
    assert handle is not None, f"{library} was not loaded"
    yield registry
    registry.deregister_library(handle)


class _Logger(trt.ILogger):
    """Keeps what it is told."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []

    def log(self, severity, message):
        if severity <= trt.Logger.ERROR:
            self.errors.append(message)


_LOGGER = _Logger()  # one for good: TensorRT hands plugins the first that it was ever given


class Parsed:
    """A model in TensorRT's parser. The network needs the builder and parser alive."""

    def __init__(self, model: onnx.ModelProto):
        self.errors = _LOGGER.errors = []
        self.builder = trt.Builder(_LOGGER)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, _LOGGER)
        self.taken = self.parser.parse(model.SerializeToString())

    def layers(self, *kinds: trt.LayerType) -> list:
        found = map(self.network.get_layer, range(self.network.num_layers))
        return [layer for layer in found if not kinds or layer.type in kinds]

    def plugins(self) -> list[str]:
        """The names of the layers that are plugins, in the order of the network."""
        return [layer.name for layer in self.layers(trt.LayerType.PLUGIN_V3)]

    def inputs(self) -> list:
        return [self.network.get_input(index) for index in range(self.network.num_inputs)]

    def engine(self, sizes: dict[str, tuple]) -> bytes:
        """The serialized engine for inputs of (least, usual, largest) shapes. Raises RuntimeError."""
        config, profile = self.builder.create_builder_config(), self.builder.create_optimization_profile()
        for tensor in self.inputs():
            profile.set_shape(tensor.name, *sizes[tensor.name])
        config.add_optimization_profile(profile)
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            raise RuntimeError("; ".join(self.errors))
        return bytes(engine)


def random_weights(traced: TracedGraph, seed: int = 0) -> list[WeightTensor]:
    """Bytes in the form of every weight of the graph. What they decode to is of no matter: nothing is computed."""
    rng, placeholders, weights = np.random.default_rng(seed), traced.placeholders(), []
    for value in traced.to_onnx().graph.input:
        if value.name in placeholders:
            kind = value.type.tensor_type
            shape = tuple(dim.dim_value for dim in kind.shape.dim)
            raw = rng.integers(0, 60, math.prod(shape) * BITS[kind.elem_type] // 8, dtype=np.uint8).tobytes()
            weights.append(WeightTensor(value.name, kind.elem_type, shape, len(raw), lambda raw=raw: raw))
    return weights
