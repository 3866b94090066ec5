"""Fuse an activation and the rotation behind it into one node.

    HadamardRotate(Gelu(x))                ->  GeluRotate(x), GeluTanhRotate(x) for approximate="tanh"
    HadamardRotate(x * Sigmoid(x))         ->  SiluRotate(x)
    HadamardRotate(a * Gelu(b))            ->  GegluRotate(x)      a, b = Split(x), the halves of its channels

So the activated tokens are written to memory once, rotated.
"""

import onnx_graphsurgeon as gs

from graphs.passes.patterns import is_graph_output, is_lrq, producer, sole_operand, value_readers
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def fuse_activation(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for rotation in [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]:
        found = activation(rotation.inputs[0])
        if found is None:
            if (obstacle := _near_miss(rotation.inputs[0])) is not None:
                result.skip(rotation, obstacle)
            continue
        if len(value_readers(rotation.inputs[0])) > 1 or is_graph_output(rotation.inputs[0], traced.graph):
            result.skip(rotation, "the activated tokens are also read elsewhere, unrotated")
            continue
        rotation.op, x = found
        rotation.inputs = [x, rotation.inputs[1]]
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def activation(tensor: gs.Tensor) -> tuple[str, gs.Tensor] | None:
    """The fused op that computes `tensor` and rotates it, and what it reads; None if no activation computes it."""
    node = producer(tensor)
    if node is None or node.domain:
        return None
    if node.op == "Gelu":
        return ("GeluTanhRotate" if node.attrs.get("approximate") == "tanh" else "GeluRotate"), node.inputs[0]
    if node.op != "Mul":
        return None
    for x, factor in (node.inputs, node.inputs[::-1]):
        if sole_operand(factor, "Sigmoid") is x:
            return "SiluRotate", x
        if (gated := _halves(x, sole_operand(factor, "Gelu"))) is not None and not _approximate(factor):
            return "GegluRotate", gated
    return None


def _halves(hidden: gs.Tensor, gate: gs.Tensor | None) -> gs.Tensor | None:
    """What `hidden` and `gate` are the first and second half of, along the last axis."""
    split = producer(hidden)
    if gate is None or split is None or split.domain or split.op != "Split" or len(split.outputs) != 2:
        return None
    in_order = split.outputs[0] is hidden and split.outputs[1] is gate
    last = split.attrs.get("axis", 0) in (-1, len(hidden.shape or ()) - 1)
    equal = bool(hidden.shape and gate.shape) and isinstance(gate.shape[-1], int) and hidden.shape[-1] == gate.shape[-1]
    return split.inputs[0] if in_order and last and equal else None


def _near_miss(tensor: gs.Tensor) -> str | None:
    """Why a product with an activation, which computes `tensor`, is none that a fused op has; None if it is no such."""
    node = producer(tensor)
    if node is None or node.domain or node.op != "Mul":
        return None
    for x, factor in (node.inputs, node.inputs[::-1]):
        gate = sole_operand(factor, "Gelu")
        if gate is None:
            if sole_operand(factor, "Sigmoid") is not None:
                return "a Sigmoid multiplies it, but of another tensor: no SiLU"
            continue
        if _halves(gate, x) is not None:
            return "the first half of the channels is the gate, GegluRotate has it in the second"
        if _halves(x, gate) is None:
            return "a Gelu multiplies it, but the two are not the halves of one tensor's channels"
        return "its Gelu is the approximate one, GegluRotate has the exact one"
    return None


def _approximate(activated: gs.Tensor) -> bool:
    return producer(activated).attrs.get("approximate", "none") != "none"
