"""The part of a cut model (`forced`) that computes one tensor, as a model of its own: what halving searches."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_tensor

from lrq_export.package import write_bytes_atomic


def write_step(model: onnx.ModelProto, folder: Path, tensor: str, path: Path) -> Path:
    """Write the nodes that lead to `tensor`, with the inputs and weights they read, as a model with that one output.

    `folder` holds the external data of `model`; what is written holds its weights itself.
    """
    nodes = _leading(model.graph, tensor)
    read = {name for node in nodes for name in node.input}
    inputs = [value for value in model.graph.input if value.name in read]
    weights = [_whole(weight, folder) for weight in model.graph.initializer if weight.name in read]
    # What layers read is float32, and so is the model's output; ONNX Runtime finds the shape.
    output = onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
    step = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "step", inputs, [output], weights),
        opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions,
    )  # fmt: skip
    write_bytes_atomic(path, step.SerializeToString(deterministic=True))
    return path


def feed_of(path: Path, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """What the model at `path` is run on, each of its inputs as `read` gives it."""
    return {value.name: read(value.name) for value in onnx.load(path, load_external_data=False).graph.input}


def first_of(graph: onnx.GraphProto, tensors: Iterable[str]) -> str:
    """The one of `tensors` that the graph computes first."""
    wanted = set(tensors)
    return next(name for node in graph.node for name in node.output if name in wanted)


def _leading(graph: onnx.GraphProto, tensor: str) -> list[onnx.NodeProto]:
    """The nodes that a tensor is computed from, in the order of the graph, which is topological."""
    needed, nodes = {tensor}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    return nodes[::-1]


def _whole(weight: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
    if weight.data_location != onnx.TensorProto.EXTERNAL:
        return weight
    copy = onnx.TensorProto()
    copy.CopyFrom(weight)
    load_external_data_for_tensor(copy, str(folder))
    copy.data_location = onnx.TensorProto.DEFAULT
    del copy.external_data[:]
    return copy
