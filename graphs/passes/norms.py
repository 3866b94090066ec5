"""The norms of a graph and what modulates them, which more than one pass looks for.

layer_norm(x) * scale + shift        adaLN, or a norm whose weights are scale and shift
rms_norm(x) * scale + shift          x / sqrt(mean(x²) + epsilon), which exporters write in single steps
"""

from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from graphs.passes.channels import NoMatch
from graphs.passes.patterns import computed_by, is_number, is_standard, producer, sole_operand


@dataclass(frozen=True)
class Norm:
    """Tokens normalized over their last axis, times `scale`, plus `shift`: (n,) or (batch, 1, n), None for 1 and 0."""

    kind: str  # LayerNorm or RMSNorm
    x: gs.Tensor
    epsilon: float
    scale: gs.Tensor | None = None
    shift: gs.Tensor | None = None


def modulated_norm(tensor: gs.Tensor) -> Norm | None:
    """The norm that computes `tensor`, modulated or with weights of its own; None if none does.

    Raises NoMatch for one that is both, or over other axes than the last.
    """
    add = computed_by(tensor, "Add")
    if add is None:
        return _norm(tensor)
    for product, shift in (add.inputs, add.inputs[::-1]):
        multiply = computed_by(product, "Mul")
        if product is shift or multiply is None:
            continue
        for normalized, scale in (multiply.inputs, multiply.inputs[::-1]):
            norm = _norm(normalized)
            if norm is None:
                continue
            if norm.scale is not None or norm.shift is not None:
                raise NoMatch("the norm before it has weights of its own and is modulated besides")
            return replace(norm, scale=scale, shift=shift)
    return None


def check_modulates(what: str, tensor: gs.Tensor, tokens: gs.Tensor) -> None:
    """Raise NoMatch unless `tensor` has a number for each channel of `tokens`, and broadcasts to their shape.

    No axis of the tokens may grow. One that has no number for a size is never stretched: a trace writes 1 where it is.
    """
    got, needed = tensor.shape, tokens.shape
    fits = got and needed and len(got) <= len(needed) and got[-1] == needed[-1]
    axes = zip(reversed(got or ()), reversed(needed or ()), strict=False)
    if not fits or any(isinstance(onto, int) and size not in (1, onto) for size, onto in axes):
        raise NoMatch(f"the {what} has shape {_listed(got)}, needed one that broadcasts to {_listed(needed)}")


def _listed(shape) -> str:
    return "unknown" if shape is None else f"({', '.join(map(str, shape))})"


def _norm(tensor: gs.Tensor) -> Norm | None:
    """The norm that computes `tensor`, without modulation."""
    found, node = _unscaled(tensor), computed_by(tensor, "Mul")
    if found is None and node is not None:
        for normalized, weight in (node.inputs, node.inputs[::-1]):
            found = _unscaled(normalized)
            if found is not None and (found.scale is not None or found.shift is not None):
                raise NoMatch("the norm before it has weights of its own and is scaled besides")
            if found is not None:
                return replace(found, scale=weight)
    return found


def _unscaled(tensor: gs.Tensor) -> Norm | None:
    node = producer(tensor)
    if not is_standard(node, "LayerNormalization"):
        return _unit_rms(node)
    return _layer_norm(node) if tensor is node.outputs[0] else None  # the others are its mean and deviation


def _layer_norm(node: gs.Node) -> Norm:
    axis, rank = node.attrs.get("axis", -1), len(node.outputs[0].shape or ())
    if axis not in (-1, rank - 1):
        raise NoMatch(f"the norm before it is over the axes from {axis}, needed the last one")
    x, scale, *rest = [tensor for tensor in node.inputs if not tensor.is_empty()]
    shift = _unless(0, rest[0]) if rest else None
    return Norm("LayerNorm", x, float(node.attrs.get("epsilon", 1e-5)), _unless(1, scale), shift)


def _unless(value: float, tensor: gs.Tensor) -> gs.Tensor | None:
    """The tensor, or None if it is a constant that holds nothing but `value`."""
    return None if isinstance(tensor, gs.Constant) and (tensor.values == value).all() else tensor


def _unit_rms(node: gs.Node | None) -> Norm | None:
    """x / sqrt(mean(x²) + epsilon), divided by the root or multiplied by its reciprocal."""
    if is_standard(node, "Div"):
        return _over_root(*node.inputs)
    if not is_standard(node, "Mul"):
        return None
    for x, factor in (node.inputs, node.inputs[::-1]):
        root = _reciprocal_of(factor)
        found = None if root is None else _over_root(x, root)
        if found is not None:
            return found
    return None


def _reciprocal_of(tensor: gs.Tensor) -> gs.Tensor | None:
    """t, if `tensor` is 1 / t."""
    division = computed_by(tensor, "Div")
    if division is None:
        return sole_operand(tensor, "Reciprocal")
    one, divisor = division.inputs
    return divisor if is_number(one) and one.values.item() == 1 else None


def _over_root(x: gs.Tensor, root: gs.Tensor) -> Norm | None:
    """x / root, if that is sqrt(mean(x²) + epsilon) over the last axis."""
    total = sole_operand(root, "Sqrt")
    add = None if total is None else computed_by(total, "Add")
    if add is None or sum(map(is_number, add.inputs)) != 1:
        return None
    averaged, epsilon = add.inputs if is_number(add.inputs[1]) else add.inputs[::-1]
    mean = computed_by(averaged, "ReduceMean")
    if mean is None or not mean.attrs.get("keepdims", 1) or len(mean.inputs) < 2:
        return None
    axes = mean.inputs[1]
    if not isinstance(axes, gs.Constant) or axes.values.tolist() not in ([-1], [len(x.shape or ()) - 1]):
        return None
    return Norm("RMSNorm", x, float(epsilon.values.item())) if _is_square(mean.inputs[0], x) else None


def _is_square(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    node = computed_by(tensor, "Mul", "Pow")
    if node is None or node.inputs[0] is not x:
        return False
    other = node.inputs[1]
    return other is x if node.op == "Mul" else is_number(other) and other.values.item() == 2
