"""Fuse an activation and the rotation behind it into one node.

    HadamardRotate(Gelu(x))                ->  GeluRotate(x), GeluTanhRotate(x) for approximate="tanh"
    HadamardRotate(x * Sigmoid(x))         ->  SiluRotate(x)
    HadamardRotate(a * Gelu(b))            ->  GegluRotate(x)      a, b = Split(x), the halves of its channels

So the activated tokens are written to memory once, rotated. The exact Gelu may be written out in single steps, as older
exports do: x * 0.5 * (1 + Erf(x / √2)).
"""

import math

import onnx_graphsurgeon as gs

from graphs.passes.patterns import (
    computed_by,
    is_graph_output,
    is_lrq,
    is_number,
    producer,
    redirect_shapes,
    sole_operand,
    value_readers,
)
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def fuse_activation(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for rotation in [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]:
        tokens, signs = rotation.inputs
        found = activation(tokens)
        if found is None:
            if (obstacle := _near_miss(tokens)) is not None:
                result.skip(rotation, obstacle)
            continue
        if len(value_readers(tokens)) > 1 or is_graph_output(tokens, traced.graph):
            result.skip(rotation, "the activated tokens are also read elsewhere, or rotated in another way")
            continue
        rotation.op, x = found
        rotation.inputs = [x, signs]
        redirect_shapes(tokens, rotation.outputs[0])
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def activation(tensor: gs.Tensor) -> tuple[str, gs.Tensor] | None:
    """The fused op that computes `tensor` and rotates it, and what it reads; None if no activation computes it."""
    if (x := _under_gelu(tensor)) is not None:
        return ("GeluTanhRotate" if _approximate(tensor) else "GeluRotate"), x
    for x, factor in _operands(tensor, "Mul"):
        if sole_operand(factor, "Sigmoid") is x:
            return "SiluRotate", x
        if (gated := _halves(x, _under_gelu(factor))) is not None and not _approximate(factor):
            return "GegluRotate", gated
    return None


def _operands(tensor: gs.Tensor, op: str) -> list[tuple[gs.Tensor, gs.Tensor]]:
    """The operands of the binary `op` that computes `tensor`, and these the other way round; [] if another does."""
    node = computed_by(tensor, op)
    return [] if node is None else [tuple(node.inputs), tuple(node.inputs[::-1])]


def _under_gelu(tensor: gs.Tensor) -> gs.Tensor | None:
    """x, if `tensor` is Gelu(x), or x * 0.5 * (1 + Erf(x / √2)) with its factors in any order."""
    if (x := sole_operand(tensor, "Gelu")) is not None:
        return x
    for bent in _factors(tensor):
        x = _under_erf(bent)
        if x is None or not x.shape or len(x.shape) != len(tensor.shape or ()):
            continue  # a number may add axes
        factors = _factors(tensor, whole=x)
        numbers = [_number(each) for each in factors if is_number(each)]
        others = [id(each) for each in factors if not is_number(each)]
        if sorted(others) == sorted([id(x), id(bent)]) and math.isclose(math.prod(numbers), 0.5):
            return x
    return None


def _factors(tensor: gs.Tensor, whole: gs.Tensor | None = None, depth: int = 3) -> list[gs.Tensor]:
    """What one Mul or several multiply to `tensor`; `whole` is one factor even where it is a product itself.

    Not more than `depth` Muls deep, one more than the factors of a Gelu need: each may double their number.
    """
    products = [] if tensor is whole or not depth else _operands(tensor, "Mul")
    return [factor for each in products[0] for factor in _factors(each, whole, depth - 1)] if products else [tensor]


def _under_erf(tensor: gs.Tensor) -> gs.Tensor | None:
    """x, if `tensor` is 1 + Erf(x / √2)."""
    for erf, one in _operands(tensor, "Add"):
        argument = sole_operand(erf, "Erf")
        if argument is None or not is_number(one) or _number(one) != 1:
            continue
        quotients = [(x, divisor, 2) for x, divisor in _operands(argument, "Div")[:1]]
        products = [(x, factor, 0.5) for x, factor in _operands(argument, "Mul")]
        for x, number, square in quotients + products:
            if is_number(number) and math.isclose(_number(number), math.sqrt(square), rel_tol=1e-6):
                return x
    return None


def _number(constant: gs.Constant) -> float:
    return float(constant.values.item())


def _halves(hidden: gs.Tensor, gate: gs.Tensor | None) -> gs.Tensor | None:
    """What `hidden` and `gate` are the first and second half of, along the last axis."""
    split = computed_by(hidden, "Split")
    if gate is None or split is None or len(split.outputs) != 2:
        return None
    in_order = split.outputs[0] is hidden and split.outputs[1] is gate
    last = split.attrs.get("axis", 0) in (-1, len(hidden.shape or ()) - 1)
    widths = [each.shape[-1] if each.shape else None for each in split.outputs]
    equal = isinstance(widths[0], int) and widths[0] == widths[1]
    return split.inputs[0] if in_order and last and equal else None


def _near_miss(tensor: gs.Tensor) -> str | None:
    """Why a product with an activation, which computes `tensor`, is none that a fused op has; None if it is no such."""
    for x, factor in _operands(tensor, "Mul"):
        gate = _under_gelu(factor)
        if gate is None:
            if activation(factor) is not None:
                return "a SiLU multiplies it, and no fused op has that gate"
            if sole_operand(factor, "Sigmoid") is not None:
                return "a Sigmoid multiplies it, but of another tensor: no SiLU"
            continue
        if _halves(gate, x) is not None:
            return "the first half of the channels is the gate, GegluRotate has it in the second"
        if _halves(x, gate) is None:
            return "a Gelu multiplies it, but the two are not the halves of one tensor's channels"
        return "its Gelu is the approximate one, GegluRotate has the exact one"
    for factor in _factors(tensor):
        for bent, _ in _operands(factor, "Add"):
            if (node := computed_by(bent, "Erf", "Tanh")) is not None:
                return f"a sum with {node.op} multiplies it: no Gelu, or one that is written out in an unknown way"
    return None


def _approximate(activated: gs.Tensor) -> bool:
    return producer(activated).attrs.get("approximate", "none") != "none"
