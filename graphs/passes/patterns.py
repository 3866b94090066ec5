"""Shapes of subgraph that more than one pass looks for. All look at structure only, never at node names."""

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphs import names
from graphs.ops import OPS, coded_weight

# The ops of every weight format: what a trace writes, what a product with it becomes, and that with a residual.
LINEAR_OF = {"TwinLogDequant": "TwinLogLinear", "CodebookDequant": "CodebookLinear", "Int8Dequant": "Int8Linear"}
DEQUANT_OPS, PLAIN_LINEAR_OPS = tuple(LINEAR_OF), tuple(LINEAR_OF.values())
RESIDUAL_OF = {op: f"{op}Residual" for op in PLAIN_LINEAR_OPS}
LINEAR_OPS = (*PLAIN_LINEAR_OPS, *RESIDUAL_OF.values())
# Those whose weights are packed codes, not plain integers.
CODED_OPS = tuple(op for op in (*DEQUANT_OPS, *LINEAR_OPS) if "bits" in {each.name for each in OPS[op].attributes})
# What ends in a rotation: alone, or fused with the norm or activation before it.
ROTATE_OPS = tuple(name for name in OPS if name.endswith("Rotate"))


def is_lrq(node: gs.Node, *op_types: str) -> bool:
    return node.domain == names.DOMAIN and node.op in op_types


def is_standard(node: gs.Node | None, *op_types: str) -> bool:
    return node is not None and not node.domain and node.op in op_types


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes `tensor`; None for a graph input or a constant."""
    return tensor.inputs[0] if tensor.inputs else None


def computed_by(tensor: gs.Tensor, *op_types: str) -> gs.Node | None:
    """The node that computes `tensor`, if it is one of these standard ops."""
    node = producer(tensor)
    return node if is_standard(node, *op_types) else None


def operand(node: gs.Node, name: str) -> gs.Tensor:
    """The input of an lrq node that its op calls `name`."""
    return node.inputs[[each.name for each in OPS[node.op].inputs].index(name)]


def codes_form(node: gs.Node) -> tuple[np.dtype, list[int]]:
    """The type and shape that the codes of one of `CODED_OPS` have in the layout that it names."""
    onnx_type, shape = coded_weight.codes_form(node.attrs)
    return onnx.helper.tensor_dtype_to_np_dtype(onnx_type), list(shape)


def numpy_type(tensor: gs.Tensor) -> np.dtype:
    """The numpy type of a tensor's elements; graphsurgeon holds ONNX's number of one that numpy lacks."""
    held = tensor.dtype
    return onnx.helper.tensor_dtype_to_np_dtype(held) if isinstance(held, int) else np.dtype(held)


def sole_operand(tensor: gs.Tensor, op: str) -> gs.Tensor | None:
    """What the standard op of one operand that computes `tensor` reads; None if another op computes it."""
    node = computed_by(tensor, op)
    return None if node is None else node.inputs[0]


def is_graph_output(tensor: gs.Tensor, graph: gs.Graph) -> bool:
    return any(tensor is output for output in graph.outputs)


def is_number(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant of one element."""
    return isinstance(tensor, gs.Constant) and math.prod(tensor.shape) == 1


def scaled_operand(node: gs.Node | None) -> int | None:
    """Which input a Mul or Div scales by one number for all elements; None for c / x and whatever else."""
    if not is_standard(node, "Mul", "Div"):
        return None
    numbers = [is_number(each) for each in node.inputs]
    if sum(numbers) != 1 or (node.op == "Div" and numbers[0]):
        return None
    return numbers.index(False)


def keeps_channels(node: gs.Node) -> bool:
    """Whether a Reshape or Transpose leaves the channels on the last axis."""
    if node.op == "Transpose":
        perm = node.attrs.get("perm", [])
        return perm[-1:] == [len(perm) - 1]
    before, after = node.inputs[0].shape, node.outputs[0].shape
    return bool(before and after) and isinstance(after[-1], int) and before[-1] == after[-1]


def sole_consumer(tensor: gs.Tensor, graph: gs.Graph) -> gs.Node | None:
    """The one node that reads `tensor`, once; None when there are more, or it is in a branch, or an output reads it."""
    return sole_value_reader(tensor, graph) if len(tensor.outputs) == 1 else None


def sole_value_reader(tensor: gs.Tensor, graph: gs.Graph) -> gs.Node | None:
    """Likewise, but others may ask for its shape: whoever then takes `tensor` away calls `redirect_shapes`."""
    readers = value_readers(tensor)
    if len(readers) != 1 or is_graph_output(tensor, graph) or is_inner(readers[0], graph):
        return None
    return readers[0]


def is_inner(node: gs.Node, graph: gs.Graph) -> bool:
    """Whether a node sits in a branch or loop of the graph, and not in the graph itself."""
    holders = [each for each in graph.nodes if each.op in ("If", "Loop", "Scan")]
    return any(node is inner for each in holders for sub in each.subgraphs(recursive=True) for inner in sub.nodes)


def value_readers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read what is in `tensor`, one entry for each read; not those that ask for its shape."""
    return [node for node in tensor.outputs if node.op != "Shape"]


def redirect_shapes(tensor: gs.Tensor, to: gs.Tensor) -> None:
    """Let every Shape that reads `tensor` read `to`, of the same shape, so that `tensor` need not be computed."""
    for reader in [node for node in tensor.outputs if node.op == "Shape"]:
        reader.inputs = [to]


def remove_node(node: gs.Node, graph: gs.Graph) -> None:
    """Take a node out of the graph whose outputs nobody reads any more."""
    node.inputs.clear()
    node.outputs.clear()
    graph.nodes = [each for each in graph.nodes if each is not node]  # remove() would take the first that looks alike


def redirect_readers(tensor: gs.Tensor, to: gs.Tensor) -> None:
    """Let every node that reads `tensor` read `to` instead."""
    for reader in list(tensor.outputs):  # a node that reads it twice is listed twice
        reader.inputs = [to if each is tensor else each for each in reader.inputs]


@dataclass(frozen=True)
class OpenLinear:
    """y = x · Transpose(Dequant(codes, ...)) [+ bias (rows,)], as the trace writes a quantized linear layer."""

    dequant: gs.Node
    matmul: gs.Node
    bias_add: gs.Node | None
    bias: gs.Tensor | None

    @property
    def input(self) -> gs.Tensor:
        return self.matmul.inputs[0]

    @property
    def output(self) -> gs.Tensor:
        return (self.bias_add or self.matmul).outputs[0]


def open_linear(matmul: gs.Node, graph: gs.Graph) -> OpenLinear | None:
    """Match an `OpenLinear` at its MatMul; None when the right operand is not a transposed dequantized weight."""
    if not is_standard(matmul, "MatMul") or is_inner(matmul, graph):
        return None
    transpose = computed_by(matmul.inputs[1], "Transpose")
    if transpose is None or transpose.attrs.get("perm") != [1, 0]:
        return None
    dequant = producer(transpose.inputs[0])
    if dequant is None or not is_lrq(dequant, *DEQUANT_OPS):
        return None
    following = sole_value_reader(matmul.outputs[0], graph)
    if is_standard(following, "Add"):
        (added,) = (tensor for tensor in following.inputs if tensor is not matmul.outputs[0])
        # Anything else that is added, a (1,) or a computed row, broadcasts and is no bias of this layer.
        if not added.inputs and list(added.shape or ()) == [dequant.attrs["rows"]]:
            return OpenLinear(dequant, matmul, following, added)
    return OpenLinear(dequant, matmul, None, None)


def layer_weight(operand: gs.Tensor) -> list[gs.Tensor]:
    """The tensors from the weight of a linear layer to its transpose `operand`; [] if that is no such thing.

    The first is the weight, by its codes if it is quantized.
    """
    transpose = computed_by(operand, "Transpose")
    if transpose is None or transpose.attrs.get("perm") != [1, 0]:
        return []
    weight = transpose.inputs[0]
    dequant = producer(weight)
    if dequant is None:
        return [weight, operand]
    return [dequant.inputs[0], weight, operand] if is_lrq(dequant, *DEQUANT_OPS) else []


def rotation_key(node: gs.Node) -> tuple | None:
    """What makes two HadamardRotate nodes the same rotation; None when the signs are not a constant."""
    signs = node.inputs[1]
    if not isinstance(signs, gs.Constant):
        return None
    return int(node.attrs["block"]), signs.values.tobytes()
