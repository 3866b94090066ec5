"""Fuse a norm, the scale and shift that modulate it, and the rotation behind it into one node.

    HadamardRotate(LayerNormalization(x) * scale + shift)  ->  LayerNormRotate(x, scale, shift)

Likewise RMSNormRotate of x / sqrt(mean(x²) + epsilon). The weights of a norm without modulation take the place of scale
and shift. So the normalized tokens are written to memory once, rotated.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphs.passes.channels import NoMatch
from graphs.passes.norms import Norm, check_modulates, modulated_norm
from graphs.passes.patterns import (
    is_graph_output,
    is_lrq,
    is_number,
    is_standard,
    numpy_type,
    producer,
    redirect_shapes,
    value_readers,
)
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def fuse_modulated_norm(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for rotation in [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]:
        try:
            norm = modulated_norm(rotation.inputs[0])
            if norm is None:
                if (op := _norm_behind(rotation.inputs[0])) is not None:
                    result.skip(rotation, f"{op} is behind what it rotates, but not in a form that a fused op has")
                continue
            _check(norm, rotation.inputs[0], traced)
        except NoMatch as reason:
            result.skip(rotation, str(reason))
            continue
        _fuse(rotation, norm)
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def _norm_behind(tensor: gs.Tensor, steps: int = 6, rooted: bool = False) -> str | None:
    """The norm from which at most so many steps lead to `tensor`, or the mean under its root; None without one."""
    node = producer(tensor)
    if is_standard(node, "LayerNormalization", "RMSNormalization", "ReduceL2"):
        return node.op
    if rooted and is_standard(node, "ReduceMean"):  # any other mean is a pool, no norm
        return node.op
    if not steps or not is_standard(node, "Add", "Sub", "Mul", "Div", "Sqrt", "Pow", "Reciprocal"):
        return None
    rooted = rooted or is_standard(node, "Sqrt") or (is_standard(node, "Pow") and _is_root(node.inputs[1]))
    behind = (_norm_behind(each, steps - 1, rooted) for each in node.inputs)
    return next((found for found in behind if found is not None), None)


def _is_root(exponent: gs.Tensor) -> bool:
    return is_number(exponent) and abs(exponent.values.item()) == 0.5


def _fuse(rotation: gs.Node, norm: Norm) -> None:
    (tokens, signs), (rotated,) = rotation.inputs, rotation.outputs
    channels, dtype = signs.shape[0], numpy_type(norm.x)
    scale = norm.scale or gs.Constant(f"{rotated.name}.scale", np.ones(channels, dtype))
    shift = norm.shift or gs.Constant(f"{rotated.name}.shift", np.zeros(channels, dtype))
    rotation.op, rotation.attrs = f"{norm.kind}Rotate", rotation.attrs | {"epsilon": norm.epsilon}
    rotation.inputs = [norm.x, scale, shift, signs]
    redirect_shapes(tokens, rotated)


def _check(norm: Norm, tokens: gs.Tensor, traced: TracedGraph) -> None:
    """Raise NoMatch unless the fused node means the same and leaves no work behind; the norm computes `tokens`."""
    if len(value_readers(tokens)) > 1 or is_graph_output(tokens, traced.graph):
        raise NoMatch("the normalized tokens are also read elsewhere, or rotated in another way")
    for what, tensor in (("scale", norm.scale), ("shift", norm.shift)):
        if tensor is not None:
            check_modulates(f"{what} of the norm before it", tensor, norm.x)
    if norm.x.shape is not None and tokens.shape is not None and len(norm.x.shape) != len(tokens.shape):
        raise NoMatch("a number of the norm before it adds axes to its tokens")
