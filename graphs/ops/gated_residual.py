"""The epilogue of a linear op that ends a branch of a transformer block: y = residual + gate * linear(x).

The gates of adaLN-Zero (Peebles and Xie, Scalable Diffusion Models with Transformers, 2023, section 3.2) are one row
per sample. All is added up in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphs.ops.spec import Shape, Tensor, dims, fits, same
from graphs.ops.token_product import Epilogue


def _add(y: np.ndarray, gate: np.ndarray, residual: np.ndarray) -> np.ndarray:
    return residual + gate * y


def _check_shapes(y: Shape, shapes: Sequence[Shape]) -> None:
    gate, residual = shapes
    fits("gate", gate, "y", y)
    if y is not None:
        for axis, (got, needed) in enumerate(zip(dims("residual", residual, len(y)), y, strict=True)):
            same(f"axis {axis} of residual", got, needed)


def _examples(rng: np.random.Generator, shape: tuple[int, ...]) -> list[tuple[np.ndarray, ...]]:
    batch, _, rows = shape
    drawn = []
    for gate_shape in ((rows,), (batch, 1, rows), shape):
        gate = rng.choice([-1, 1], gate_shape) * rng.uniform(1, 2, gate_shape)  # never small: each weight shows in y
        drawn.append((gate.astype(np.float32), rng.standard_normal(shape, np.float32)))
    return drawn


_BODY = """
    gate_f = Cast<to = 1>(gate)
    residual_f = Cast<to = 1>(residual)
    gated = Mul(y_f, gate_f)
    y_sum = Add(residual_f, gated)
    y = CastLike(y_sum, x)
"""

GATED_RESIDUAL = Epilogue(
    inputs=(
        Tensor("gate", "T", "(rows,), or up to y's own axes: (B, 1, rows), (B, T, rows)"),
        Tensor("residual", "T", "(..., rows), y's shape"),
    ),
    reference=_add,
    body=_BODY,
    check_shapes=_check_shapes,
    examples=_examples,
)
