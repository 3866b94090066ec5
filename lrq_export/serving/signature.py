"""The tensors of a package as the protocol describes them: the same for each of its engines."""

from collections.abc import Mapping
from pathlib import Path

from lrq_export.models.base import InputSpec
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.serving.protocol import TensorInfo

FLOAT = "FP32"  # of every input and output: graphs take float32 throughout


def inputs_of(specs: Mapping[str, InputSpec]) -> dict[str, TensorInfo]:
    return {name: _described(name, spec.shape) for name, spec in specs.items()}


def outputs_of(package: Path) -> dict[str, TensorInfo]:
    """Those of the graph that all engines are made of, which unlike model.onnx is small."""
    return {tensor.name: _described(tensor.name, tensor.shape) for tensor in rewritten_graph(package).graph.outputs}


def _described(name: str, shape) -> TensorInfo:
    return TensorInfo(name, FLOAT, tuple(size if isinstance(size, int) else -1 for size in shape))
