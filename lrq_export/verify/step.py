"""The part of a cut model (`forced`) that computes one tensor, as a model of its own: what halving searches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_tensor

from lrq_export.onnx_file import WeightTensor
from lrq_export.package import write_bytes_atomic


def write_step(
    model: onnx.ModelProto, folder: Path, tensor: str, path: Path, read: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Write the nodes that lead to `tensor`, with the weights they read, as a model with that one output.

    `folder` holds the external data of `model`; what is written holds its weights itself. `read` gives each input of
    the model; returns those of the step, whose sizes it is written for.
    """
    nodes = _leading(model.graph, tensor)
    named = {name for node in nodes for name in node.input}
    feed = {value.name: read(value.name) for value in model.graph.input if value.name in named}
    weights = [_whole(weight, folder) for weight in model.graph.initializer if weight.name in named]
    # What layers read is float32, and so is the model's output; ONNX Runtime finds the shape.
    output = onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
    step = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "step", sized_inputs([feed]), [output], weights),
        opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions,
    )  # fmt: skip
    write_bytes_atomic(path, step.SerializeToString(deterministic=True))
    return feed


def sized_inputs(cases: Sequence[Mapping[str, np.ndarray]]) -> list[onnx.ValueInfoProto]:
    """Inputs of a graph for these cases: sizes in which they differ are free. TensorRT wants every input's rank."""
    found = []
    for name, array in cases[0].items():
        sizes = [set(each) for each in zip(*(case[name].shape for case in cases), strict=True)]
        shape = [next(iter(each)) if len(each) == 1 else f"{name}.{axis}" for axis, each in enumerate(sizes)]
        onnx_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        found.append(onnx.helper.make_tensor_value_info(name, onnx_type, shape))
    return found


def first_of(graph: onnx.GraphProto, tensors: Iterable[str]) -> str:
    """The one of `tensors` that the graph computes first."""
    wanted = set(tensors)
    return next(name for node in graph.node for name in node.output if name in wanted)


def reader_of(graph: onnx.GraphProto, weight: str) -> str | None:
    """What the first node that reads a weight computes; None if none does."""
    return next((node.output[0] for node in graph.node if weight in node.input), None)


def put_weights(path: Path, meant: Iterable[WeightTensor]) -> None:
    """Write the model at `path` anew with the bytes that are meant for its weights."""
    model = onnx.load(path)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for weight in meant:
        if weight.name in held:
            held[weight.name].raw_data = weight.read()
    write_bytes_atomic(path, model.SerializeToString(deterministic=True))


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
