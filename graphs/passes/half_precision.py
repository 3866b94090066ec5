"""Let a target compute its activations in half precision, float16 or bfloat16.

    z = Add(Gelu(x), bias), all float32   ->   z = Cast(Add(Gelu(Cast(x)), bias)), bias half, Casts at the edges alone

TensorRT's networks are strongly typed: an engine computes in the types that its graph has. Half becomes what a weight
has reached, from the first products to the last; constants and weights kept in floating point are rounded ahead of
time. Float32 stay

- inputs and outputs of the model, and what no weight has reached: sinusoids, masks, ranges. A Cast is where they enter,
  behind a Clip: the lowest float32 of a mask would be -inf, and a softmax whose row is all -inf is NaN;
- what only sinusoids read, such as a timestep times learned frequencies;
- sums and means, the squares that they add up, and what is computed of them, up to the step in which activations join
  again: norms that are written out in single steps. A channel of 256 has a square past 65504, the largest float16, and
  what guards their divisor from zero, such as 1e-12, would be zero;
- a step whose constant float16 does not hold, such as a division by 1e9, unless it is as good as infinite or as nothing
  there: a mask that is added, a guard in a maximum;
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
from graphs.passes.patterns import (
    is_graph_output,
    is_lrq,
    is_number,
    is_standard,
    numpy_type,
    redirect_readers,
    value_readers,
)
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph

# Where a number that is too large or too small stands for infinity or for nothing, or bounds what there may be.
_MASKED = ("Add", "Sub", "Where")
_GUARDED = (*_MASKED, "Max", "Min", "Clip")
FLOAT, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def to_float16(traced: TracedGraph) -> PassResult:
    return _Lowering(traced, FLOAT16).run()


def to_bfloat16(traced: TracedGraph) -> PassResult:
    return _Lowering(traced, BFLOAT16).run()


def rounded(values: np.ndarray, element: np.dtype) -> np.ndarray:
    """`values` in another float type, where finite numbers stay finite and only zero is zero.

    A mask's lowest float32 would be -inf, and a divisor's guard 0. What is past the largest becomes `_limit`.
    """
    bounds = ml_dtypes.finfo(element)
    size = np.where(values == 0, 0, np.maximum(abs(values), float(bounds.smallest_subnormal)))
    size = np.where(np.isfinite(values) & (size > float(bounds.max)), _limit(element), size)
    return np.asarray(np.copysign(size, values)).astype(element)


def _limit(element: np.dtype) -> float:
    """Half of the largest number: as good as infinite, and finite still when something is added to it."""
    return float(ml_dtypes.finfo(element).max) / 2


class _Lowering:
    """One run of the pass. The type of every node is decided first, in order; then tensors get theirs, and Casts."""

    def __init__(self, traced: TracedGraph, half: np.dtype):
        register()
        self.traced, self.graph, self.half = traced, traced.graph, half
        self.result = PassResult()
        self.weights = set(traced.float_inputs())
        self.halved: set[str] = set()  # tensors that become half
        self.sums: set[str] = set()  # tensors that were added up of what a weight has reached, or computed of such
        self.angles = _only_for_sinusoids(self.graph)
        self.casts: dict[tuple[str, np.dtype], gs.Tensor] = {}

    def run(self) -> PassResult:
        nodes = list(self.graph.nodes)
        types = [self._decide(node) for node in nodes]
        self._round_known(nodes, types)
        for node, element in zip(nodes, types, strict=True):
            changed = self._wire(node, element) | self._retype_outputs(node, element)
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
        reached = self._is_reached(node)
        if self._goes_on_with_a_sum(node, reached):
            joined = any(self._held(tensor) == self.half for tensor in node.inputs)
            (self.halved if joined else self.sums).update(self._float_outputs(node))
            return FLOAT
        if not reached:
            return FLOAT
        reason = self._stays_float(node)
        if reason is not None:
            self.result.skip(node, reason)
            self.sums.update(self._float_outputs(node) if _is_of_a_sum(node) else ())
            return FLOAT
        signature = self._signature(node)
        used = {signature.input(index) for index, tensor in enumerate(node.inputs) if self._held(tensor)}
        self.halved |= {
            tensor.name
            for index, tensor in enumerate(node.outputs)
            if self._held(tensor) == FLOAT and signature.output(index) in used
        }
        return self.half

    def _float_outputs(self, node: gs.Node) -> list[str]:
        return [tensor.name for tensor in node.outputs if self._held(tensor) == FLOAT]

    def _goes_on_with_a_sum(self, node: gs.Node, reached: bool) -> bool:
        """Whether a node computes something else of a sum, or joins it with the activations again, number by number."""
        if not any(tensor.name in self.sums for tensor in node.inputs):
            return False
        return not reached or is_standard(node, "Add", "Sub", "Mul", "Div")

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
        if _is_of_a_sum(node):
            return "what is added up stays in float32"
        if is_standard(node, "Sin", "Cos"):
            return "a sinusoid stays in float32, though a weight has reached its argument"
        if id(node) in self.angles:
            return "what only a sinusoid reads stays in float32"
        if not all(_is_held(tensor, node, self.half) for tensor in node.inputs if isinstance(tensor, gs.Constant)):
            return f"{self.half.name} does not hold its constant"
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
                source = tensor
                if tensor.name in self.weights:
                    self.result.skip(tensor, "this weight is read in float32 too: a Cast rounds it")
                elif element == self.half:
                    source = self._clipped(tensor)
                self.casts[tensor.name, element] = self._cast(source, gs.Variable(name, element, tensor.shape))
        return self.casts[tensor.name, element]

    def _clipped(self, tensor: gs.Tensor) -> gs.Tensor:
        """A float32 tensor within what half holds, with room for something to be added."""
        most, name = _limit(self.half), f"{tensor.name}.clipped"
        bounds = [
            gs.Constant(f"{name}.{end}", np.array(value, FLOAT)) for end, value in (("least", -most), ("most", most))
        ]
        clipped = gs.Variable(name, FLOAT, tensor.shape)
        self.graph.nodes.append(gs.Node("Clip", f"{name}.clip", {}, [tensor, *bounds], [clipped]))
        return clipped

    def _cast(self, tensor: gs.Tensor, result: gs.Tensor) -> gs.Tensor:
        to = onnx.helper.np_dtype_to_tensor_dtype(numpy_type(result))
        self.graph.nodes.append(gs.Node("Cast", f"{result.name}.cast", {"to": to}, [tensor], [result]))
        return result

    def _retype_outputs(self, node: gs.Node, element: np.dtype) -> bool:
        """Give the outputs of a node their type, behind a Cast if it computes in another; the model's keep float32."""
        changed = [tensor for tensor in node.outputs if tensor.name in self.halved]
        for tensor in changed:
            if not is_graph_output(tensor, self.graph):
                tensor.dtype = self.half
            else:
                self.halved.discard(tensor.name)
            if numpy_type(tensor) != element:
                self._cast_behind(node, tensor, element)
        return bool(changed)

    def _cast_behind(self, node: gs.Node, output: gs.Tensor, element: np.dtype) -> None:
        """Let a node compute an output in another type than it has; who wants that type reads it there."""
        inner = gs.Variable(f"{output.name}.{element.name}", element, output.shape)
        if element == self.half:
            redirect_readers(output, inner)
        node.outputs = [inner if tensor is output else tensor for tensor in node.outputs]
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


def _is_held(constant: gs.Constant, node: gs.Node, element: np.dtype) -> bool:
    """Whether a node computes the same with a constant once that is `rounded`."""
    values = np.asarray(constant.values)
    if values.dtype != FLOAT or node.domain:
        return True
    size = np.max(abs(values[np.isfinite(values)]), initial=0)  # single numbers of a table may be tiny
    bounds = ml_dtypes.finfo(element)
    is_small, is_large = 0 < size < float(bounds.smallest_normal), size > float(bounds.max)
    return not (is_small and node.op not in _GUARDED) and not (is_large and node.op not in _MASKED)


def _inner_nodes(node: gs.Node) -> Iterator[gs.Node]:
    """The nodes of its branches."""
    for subgraph in node.subgraphs(recursive=True):
        yield from subgraph.nodes


def _only_for_sinusoids(graph: gs.Graph) -> set[int]:
    """The ids of the nodes whose values nothing reads but the arguments of sinusoids: half knows 999 to a half."""
    found: set[int] = set()
    for node in reversed(graph.nodes):
        readers = [reader for tensor in node.outputs for reader in value_readers(tensor)]
        told = any(is_graph_output(tensor, graph) for tensor in node.outputs)
        if readers and not told and all(is_standard(each, "Sin", "Cos") or id(each) in found for each in readers):
            found.add(id(node))
    return found


def _is_of_a_sum(node: gs.Node) -> bool:
    """Whether a node adds up, or is the square that one adds up."""
    return _adds_up(node) or (_is_square(node) and any(map(_adds_up, node.outputs[0].outputs)))


def _adds_up(node: gs.Node) -> bool:
    return is_standard(node, node.op) and node.op.startswith("Reduce") and node.op not in ("ReduceMax", "ReduceMin")


def _is_square(node: gs.Node) -> bool:
    """x * x or x ** 2."""
    if is_standard(node, "Mul"):
        return node.inputs[0] is node.inputs[1]
    return is_standard(node, "Pow") and is_number(node.inputs[1]) and node.inputs[1].values.item() == 2
