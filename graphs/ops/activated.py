"""The prologue of ops that rotate an activation, which is computed in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from graphs.ops.rotated import Prologue
from graphs.ops.spec import AttributeValue, Example, Shape, Tensor


def activated(activation: Callable[[np.ndarray], np.ndarray], body: str, *, parts: int = 1) -> Prologue:
    """The prologue of an activation from x (..., parts n) to tokens (..., n).

    activation: x float32 -> tokens float32; body: ONNX text from `x_f`, float, to `active`, likewise.
    """

    def infer_shape(shapes: Sequence[Shape], _: Mapping[str, AttributeValue]) -> Shape:
        (x,) = shapes
        if x is None or parts == 1:
            return x
        *free, channels = x
        if not isinstance(channels, int):
            return (*free, None)
        if channels % parts:
            raise ValueError(f"x has {channels} channels, needed a multiple of {parts}")
        return (*free, channels // parts)

    def example(rng: np.random.Generator, shape: tuple[int, ...]) -> Example:
        return Example((rng.normal(0, 2, (*shape[:-1], parts * shape[-1])).astype(np.float32),), {})

    return Prologue(
        inputs=(Tensor("x", "T", f"(..., {parts} n)" if parts > 1 else "(..., n)"),),
        attributes=(),
        reference=activation,
        body=f"{_TO_FLOAT}{body}{_SIGN}",
        infer_shape=infer_shape,
        example=example,
    )


_TO_FLOAT = """
    x_f = Cast<to = 1>(x)
"""

_SIGN = """
    active_signed = Mul(active, signs_scaled)
    x_signed = CastLike(active_signed, x)
"""
