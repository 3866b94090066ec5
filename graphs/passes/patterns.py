"""Shapes of subgraph that more than one pass looks for. All look at structure only, never at node names."""

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphs import names
from graphs.ops import OPS

# The two ops of every weight format: what a trace writes, and what a product with it becomes.
LINEAR_OF = {"TwinLogDequant": "TwinLogLinear", "CodebookDequant": "CodebookLinear", "Int8Dequant": "Int8Linear"}
DEQUANT_OPS, LINEAR_OPS = tuple(LINEAR_OF), tuple(LINEAR_OF.values())


def is_lrq(node: gs.Node, *op_types: str) -> bool:
    return node.domain == names.DOMAIN and node.op in op_types and node.op in OPS


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes `tensor`; None for a graph input or a constant."""
    return tensor.inputs[0] if tensor.inputs else None


def is_graph_output(tensor: gs.Tensor, graph: gs.Graph) -> bool:
    return any(tensor is output for output in graph.outputs)


def sole_consumer(tensor: gs.Tensor, graph: gs.Graph) -> gs.Node | None:
    """The one node that reads `tensor`, once; None when there are more, or when it leaves the graph."""
    return tensor.outputs[0] if len(tensor.outputs) == 1 and not is_graph_output(tensor, graph) else None


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

    @property
    def weight(self) -> gs.Tensor:
        """Its codes, which stand for it."""
        return self.dequant.inputs[0]

    def owns_its_weight(self, graph: gs.Graph) -> bool:
        """Whether nothing else reads the codes, the dequantized weight or its transpose."""
        path = (self.weight, self.dequant.outputs[0], self.matmul.inputs[1])
        return all(sole_consumer(tensor, graph) is not None for tensor in path)


def open_linear(matmul: gs.Node, graph: gs.Graph) -> OpenLinear | None:
    """Match an `OpenLinear` at its MatMul; None when the right operand is not a transposed dequantized weight."""
    if matmul.op != "MatMul":
        return None
    transpose = producer(matmul.inputs[1])
    if transpose is None or transpose.op != "Transpose" or transpose.attrs.get("perm") != [1, 0]:
        return None
    dequant = producer(transpose.inputs[0])
    if dequant is None or not is_lrq(dequant, *DEQUANT_OPS):
        return None
    following = sole_consumer(matmul.outputs[0], graph)
    if following is not None and following.op == "Add":
        others = [tensor for tensor in following.inputs if tensor is not matmul.outputs[0]]
        # Anything else that is added, a (1,) or a computed row, broadcasts and is no bias of this layer.
        if len(others) == 1 and not others[0].inputs and list(others[0].shape or ()) == [dequant.attrs["rows"]]:
            return OpenLinear(dequant, matmul, following, others[0])
    return OpenLinear(dequant, matmul, None, None)


@dataclass(frozen=True)
class FloatLinear:
    """y = x · Transpose(weight) [+ bias (rows,)], a linear layer that stays in floating point; weight (rows, cols)."""

    weight: gs.Tensor
    transposed: gs.Tensor
    bias: gs.Tensor | None

    def owns_its_weight(self, graph: gs.Graph) -> bool:
        """Whether nothing else reads the weight or its transpose."""
        return all(sole_consumer(tensor, graph) is not None for tensor in (self.weight, self.transposed))


def float_linear(output: gs.Tensor, graph: gs.Graph) -> FloatLinear | None:
    """The `FloatLinear` whose output this is."""
    node, bias = producer(output), None
    if node is not None and node.op == "Add":
        products = [tensor for tensor in node.inputs if (made := producer(tensor)) is not None and made.op == "MatMul"]
        others = [tensor for tensor in node.inputs if not tensor.inputs]
        if len(products) != 1 or len(others) != 1 or sole_consumer(products[0], graph) is not node:
            return None
        (bias,), node = others, producer(products[0])
    transpose = producer(node.inputs[1]) if node is not None and node.op == "MatMul" else None
    if transpose is None or transpose.op != "Transpose" or transpose.attrs.get("perm") != [1, 0]:
        return None
    weight = transpose.inputs[0]
    if weight.inputs or (bias is not None and list(bias.shape or ()) != list(weight.shape or ())[:1]):
        return None
    return FloatLinear(weight, node.inputs[1], bias)


def open_linear_ending_in(output: gs.Tensor, graph: gs.Graph) -> OpenLinear | None:
    """The `OpenLinear` whose output this is."""
    node = producer(output)
    if node is not None and node.op == "Add":
        candidates = [producer(operand) for operand in node.inputs]
        node = next((each for each in candidates if each is not None and each.op == "MatMul"), None)
    linear = open_linear(node, graph) if node is not None else None
    return linear if linear is not None and linear.output is output else None


def rotation_key(node: gs.Node) -> tuple | None:
    """What makes two HadamardRotate nodes the same rotation; None when the signs are not a constant."""
    signs = node.inputs[1]
    if not isinstance(signs, gs.Constant):
        return None
    return int(node.attrs["block"]), signs.values.tobytes()
