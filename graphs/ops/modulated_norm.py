"""The prologue of ops that normalize each token and then modulate it: tokens = norm(x) * scale + shift.

Adaptive layer norm (Peebles and Xie, Scalable Diffusion Models with Transformers, 2023, section 3.2) has 1 + scale in
place of scale; that sum is left outside, on a tensor of one row per sample. In a body the signs go to scale and shift
for the same reason: those are small, the tokens are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from graphs.ops.rotated import Prologue, X
from graphs.ops.spec import Attribute, AttributeValue, Example, Shape, Tensor, fits

# (block, shape of x, shape of scale, shape of shift, epsilon)
CASES = (
    (1152, (2, 3, 1152), (2, 1, 1152), (2, 1, 1152), 1e-6),
    (4608, (1, 4608), (4608,), (4608,), 1e-6),
    (72, (2, 5, 144), (2, 5, 144), (144,), 1e-5),
    (128, (2, 3, 128), (3, 128), (1, 1, 128), 1e-6),
    (1, (4, 10), (10,), (4, 10), 0.5),
)


def modulated_norm(normalize: Callable[[np.ndarray, np.float32], np.ndarray], body: str) -> Prologue:
    """The prologue around a norm without affine parameters.

    normalize: (x (..., n) float32, epsilon) -> normalized tokens, likewise.
    body: ONNX text from `x_f`, float, to `unit`, likewise; @epsilon is its attribute.
    """

    def modulate(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, *, epsilon: float) -> np.ndarray:
        return normalize(x, np.float32(epsilon)) * scale + shift

    return Prologue(
        inputs=(X, Tensor("scale", "T", _MODULATES), Tensor("shift", "T", _MODULATES)),
        attributes=(Attribute("epsilon", float, "added to the mean square of a token before the square root"),),
        reference=modulate,
        body=f"{_TO_FLOAT}{body}{_MODULATE}",
        infer_shape=_infer_shape,
        example=_example,
    )


_MODULATES = "(n,), or up to x's own axes: (B, 1, n), (B, T, n)"


def _infer_shape(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> Shape:
    x, scale, shift = shapes
    if attributes["epsilon"] < 0:
        raise ValueError(f"epsilon is {attributes['epsilon']}, needed 0 or more")
    fits("scale", scale, "x", x)
    fits("shift", shift, "x", x)
    return x


def _example(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    shift_shape: tuple[int, ...],
    epsilon: float,
) -> Example:
    x = rng.normal(0.5, 2, shape)
    scale, shift = rng.normal(1, 0.3, scale_shape), rng.normal(0, 0.3, shift_shape)
    return Example(tuple(array.astype(np.float32) for array in (x, scale, shift)), {"epsilon": epsilon})


_TO_FLOAT = """
    x_f = Cast<to = 1>(x)
"""

_MODULATE = """
    scale_f = Cast<to = 1>(scale)
    shift_f = Cast<to = 1>(shift)
    scale_signed = Mul(scale_f, signs_scaled)
    shift_signed = Mul(shift_f, signs_scaled)
    stretched = Mul(unit, scale_signed)
    moved = Add(stretched, shift_signed)
    x_signed = CastLike(moved, x)
"""
