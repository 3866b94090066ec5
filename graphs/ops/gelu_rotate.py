"""GeluRotate: y = HadamardRotate(gelu(x)), the exact GELU (Hendrycks and Gimpel, Gaussian Error Linear Units, 2016)."""

import math

import numpy as np

from graphs.ops.activated import activated
from graphs.ops.rotated import rotated_op

_tail = np.vectorize(math.erfc, otypes=[np.float64])


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x) in float32, Phi the distribution function of the normal distribution: (1 + erf(x / sqrt(2))) / 2."""
    return (x * 0.5 * _tail(-x / math.sqrt(2))).astype(np.float32)


GELU_ROTATE = rotated_op(
    "GeluRotate",
    "The exact GELU, x (1 + erf(x / sqrt(2))) / 2, then HadamardRotate.",
    activated(gelu, "    active = Gelu(x_f)"),
)
