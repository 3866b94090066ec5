"""HadamardRotate: y = x diag(signs) H on each contiguous block of channels; `graphs.ops.rotated` says what H is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphs.ops.rotated import CASES, Prologue, X, rotated_op, rotation_attributes
from graphs.ops.spec import AttributeValue, Example, Shape

__all__ = ["HADAMARD_ROTATE", "rotation_attributes"]


def _shape_of_x(shapes: Sequence[Shape], _: Mapping[str, AttributeValue]) -> Shape:
    return shapes[0]


def _example(rng: np.random.Generator, shape: tuple[int, ...]) -> Example:
    return Example((rng.standard_normal(shape, np.float32),), {})


_BODY = """
    scaled = CastLike(signs_scaled, x)
    x_signed = Mul(x, scaled)
"""

HADAMARD_ROTATE = rotated_op(
    "HadamardRotate",
    "y = x diag(signs) H on each contiguous block of channels.",
    Prologue(
        inputs=(X,),
        attributes=(),
        reference=lambda x: x,
        body=_BODY,
        infer_shape=_shape_of_x,
        example=_example,
    ),
    [*CASES, (12, (7, 36)), (768, (1, 768)), (2, (3, 4))],
)
