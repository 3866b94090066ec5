"""Let a target compute its activations in half precision, float16 or bfloat16.

    z = Add(Gelu(x), bias), all float32   ->   z = Cast(Add(Gelu(Cast(x)), bias)), bias half, Casts at the edges alone

TensorRT's networks are strongly typed: an engine computes in the types that its graph has. Half becomes what a weight
has reached, from the first products to the last; constants and weights kept in floating point are rounded ahead of
time. Float32 stay

- inputs and outputs of the model, and what no weight has reached: sinusoids, masks, ranges. A Cast is where they enter;
- sums and means, and the squares that they add up, until activations join again: norms that are written out in single
  steps. A channel of 256 has a square past 65504, the largest float16;
- what an op defines so: scale and bias of a linear layer, which adds up in float32 in any case.

bfloat16 has the range of float32, but 8 bits where float16 has 11.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphs import names
from graphs.ops import OPS, register
from graphs.passes.patterns import is_graph_output, is_lrq, is_number, is_standard, numpy_type, redirect_readers
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph

FLOAT, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def to_float16(traced: TracedGraph) -> PassResult:
    return _Lowering(traced, FLOAT16).run()


def to_bfloat16(traced: TracedGraph) -> PassResult:
    return _Lowering(traced, BFLOAT16).run()


def rounded(values: np.ndarray, element: np.dtype) -> np.ndarray:
    """`values` in another float type, where finite numbers stay finite and only zero is zero.

    A mask's lowest float32 would be -inf, and a divisor's guard 0.
    """
    bounds = ml_dtypes.finfo(element)
    tiny, most = float(bounds.smallest_subnormal), float(bounds.max)
    size = np.where(np.isfinite(values) & (values != 0), np.clip(abs(values), tiny, most), abs(values))
    return np.asarray(np.copysign(size, values)).astype(element)


class _Lowering:
    """One run of the pass. The type of every node is decided first, in order; then tensors get theirs, and Casts."""

    def __init__(self, traced: TracedGraph, half: np.dtype):
        register()
        self.traced, self.graph, self.half = traced, traced.graph, half
        self.result = PassResult()
        self.weights = set(traced.float_inputs())
        self.halved: set[str] = set()  # tensors that become half
        self.casts: dict[tuple[str, np.dtype], gs.Tensor] = {}

    def run(self) -> PassResult:
        nodes = list(self.graph.nodes)
        types = [self._decide(node) for node in nodes]
        self._round_known(nodes, types)
        for node, element in zip(nodes, types, strict=True):
            changed = self._wire(node, element) | self._retype_outputs(node)
            for inner in _inner_nodes(node):
                self._wire(inner, FLOAT)
            self.result.fired += changed and element == self.half
        if self.result.fired:
            self.traced.forget_unused()
        return self.result

    def _held(self, tensor: gs.Tensor) -> np.dtype | None:
        """The type of a tensor once the pass has run; None if it holds no floats."""
        if tensor.is_empty() or tensor.dtype is None:
            return None
        held = self.half if tensor.name in self.halved else numpy_type(tensor)
        return held if held in (FLOAT, self.half) else None

    def _decide(self, node: gs.Node) -> np.dtype:
        """The type in which a node computes."""
        if is_standard(node, "Cast"):
            return FLOAT  # it takes any, and says itself what it gives
        if not self._is_reached(node):
            return FLOAT
        reason = self._stays_float(node)
        if reason is not None:
            self.result.skip(node, reason)
            return FLOAT
        signature = self._signature(node)
        used = {signature.input(index) for index, tensor in enumerate(node.inputs) if self._held(tensor)}
        self.halved |= {
            tensor.name
            for index, tensor in enumerate(node.outputs)
            if self._held(tensor) == FLOAT and signature.output(index) in used
        }
        return self.half

    def _is_reached(self, node: gs.Node) -> bool:
        """Whether a node reads a weight, or what depends on one, where its op leaves the type open."""
        signature = self._signature(node)
        reads = [tensor for index, tensor in enumerate(node.inputs) if self._held(tensor) and signature.is_free(index)]
        if is_lrq(node, *OPS):
            return bool(reads)
        return any(self._held(tensor) == self.half or tensor.name in self.weights for tensor in reads)

    def _stays_float(self, node: gs.Node) -> str | None:
        """Why a node that a weight has reached computes in float32; None if it does not."""
        if any(node.subgraphs()):
            return "its branches stay in float32"
        if _adds_up(node) or (_is_square(node) and any(map(_adds_up, node.outputs[0].outputs))):
            return "what is added up stays in float32"
        if is_standard(node, "Sin", "Cos"):
            return "a sinusoid stays in float32, though a weight has reached its argument"
        signature = self._signature(node)
        floats = [index for index, tensor in enumerate(node.inputs) if self._held(tensor)]
        if all(signature.takes(index, self.half) for index in floats if signature.is_free(index)):
            return None
        return f"{node.op} of opset {self.graph.opset} takes no {self.half.name}"

    def _signature(self, node: gs.Node) -> "_Signature":
        return _signature(node.op, node.domain or "", names.OPSET if node.domain else self.graph.opset)

    def _reads(self, node: gs.Node, element: np.dtype) -> list[np.dtype]:
        """For each input of a node the type that it must have, if it holds floats, where the node computes in one."""
        signature = self._signature(node)
        return [element if signature.is_free(index) else FLOAT for index in range(len(node.inputs))]

    def _round_known(self, nodes: list[gs.Node], types: list[np.dtype]) -> None:
        """Constants and kept weights become half of which nobody wants the float32."""
        wanted: dict[str, set[np.dtype]] = {tensor.name: {FLOAT} for tensor in self.graph.outputs}
        for node, element in zip(nodes, types, strict=True):
            for tensor, each in zip(node.inputs, self._reads(node, element), strict=True):
                wanted.setdefault(tensor.name, set()).add(each)
            for tensor in [tensor for inner in _inner_nodes(node) for tensor in inner.inputs]:
                wanted.setdefault(tensor.name, set()).add(FLOAT)
        for tensor in self.graph.tensors().values():
            if wanted.get(tensor.name) != {self.half} or self._held(tensor) != FLOAT:
                continue
            if isinstance(tensor, gs.Constant):
                tensor.values = rounded(tensor.values, self.half)
            elif tensor.name in self.weights:
                tensor.dtype = self.half

    def _wire(self, node: gs.Node, element: np.dtype) -> bool:
        """Let a node read floats of the type in which it computes; whether that is a change."""
        if is_standard(node, "Cast"):
            return False
        before = list(node.inputs)
        after = [self._as(*pair) for pair in zip(before, self._reads(node, element), strict=True)]
        changed = any(new is not old for new, old in zip(after, before, strict=True))
        if changed:
            node.inputs = after
        return changed

    def _as(self, tensor: gs.Tensor, element: np.dtype) -> gs.Tensor:
        """The same values in a type: the tensor itself, the twin of a constant, or what a Cast makes of it."""
        if self._held(tensor) in (None, element):
            return tensor
        if (tensor.name, element) not in self.casts:
            name = f"{tensor.name}.{element.name}"
            if isinstance(tensor, gs.Constant):
                self.casts[tensor.name, element] = gs.Constant(name, rounded(tensor.values, element))
            else:
                if tensor.name in self.weights:
                    self.result.skip(tensor, "this weight is read in float32 too: a Cast rounds it")
                self.casts[tensor.name, element] = self._cast(tensor, gs.Variable(name, element, tensor.shape))
        return self.casts[tensor.name, element]

    def _cast(self, tensor: gs.Tensor, result: gs.Tensor) -> gs.Tensor:
        to = onnx.helper.np_dtype_to_tensor_dtype(numpy_type(result))
        self.graph.nodes.append(gs.Node("Cast", f"{result.name}.cast", {"to": to}, [tensor], [result]))
        return result

    def _retype_outputs(self, node: gs.Node) -> bool:
        """Give the outputs of a node their type; those of the model keep float32, behind a Cast."""
        changed = [tensor for tensor in node.outputs if tensor.name in self.halved]
        for tensor in changed:
            if is_graph_output(tensor, self.graph):
                self._cast_at_the_edge(node, tensor)
            else:
                tensor.dtype = self.half
        return bool(changed)

    def _cast_at_the_edge(self, node: gs.Node, output: gs.Tensor) -> None:
        inner = gs.Variable(f"{output.name}.{self.half.name}", self.half, output.shape)
        redirect_readers(output, inner)
        node.outputs = [inner if tensor is output else tensor for tensor in node.outputs]
        self.halved.discard(output.name)
        self._cast(inner, output)


@dataclass(frozen=True)
class _Signature:
    """The types of an op's inputs and outputs by its schema: names of type variables, or fixed types."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    variables: dict[str, frozenset[str]]  # the types that each stands for, such as tensor(float16)

    def input(self, index: int) -> str | None:
        """The last one of a variadic op stands for all that follow."""
        return self.inputs[min(index, len(self.inputs) - 1)] if self.inputs else None

    def output(self, index: int) -> str | None:
        return self.outputs[min(index, len(self.outputs) - 1)] if self.outputs else None

    def is_free(self, index: int) -> bool:
        """Whether the op leaves the type of an input open."""
        return self.input(index) in self.variables

    def takes(self, index: int, element: np.dtype) -> bool:
        return f"tensor({element.name})" in self.variables[self.input(index)]


@cache
def _signature(op: str, domain: str, opset: int) -> _Signature:
    """Of an op without a schema: that everything about it is fixed."""
    if not onnx.defs.has(op, opset, domain):
        return _Signature((), (), {})
    schema = onnx.defs.get_schema(op, opset, domain)
    variables = {each.type_param_str: frozenset(each.allowed_type_strs) for each in schema.type_constraints}
    inputs, outputs = (tuple(each.type_str for each in side) for side in (schema.inputs, schema.outputs))
    return _Signature(inputs, outputs, variables)


def _inner_nodes(node: gs.Node) -> Iterator[gs.Node]:
    """The nodes of its branches."""
    for subgraph in node.subgraphs(recursive=True):
        yield from subgraph.nodes


def _adds_up(node: gs.Node) -> bool:
    return is_standard(node, node.op) and node.op.startswith("Reduce") and node.op not in ("ReduceMax", "ReduceMin")


def _is_square(node: gs.Node) -> bool:
    """x * x or x ** 2."""
    if is_standard(node, "Mul"):
        return node.inputs[0] is node.inputs[1]
    return is_standard(node, "Pow") and is_number(node.inputs[1]) and node.inputs[1].values.item() == 2
