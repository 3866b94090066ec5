"""SiluRotate: y = HadamardRotate(silu(x)), silu(x) = x / (1 + exp(-x)) (Elfwing, Uchibe and Doya, 2017)."""

import numpy as np

from graphs.ops.activated import activated
from graphs.ops.rotated import rotated_op


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # far below zero, where silu is 0
        return x / (1 + np.exp(-x))


_BODY = """
    sigmoid = Sigmoid(x_f)
    active = Mul(x_f, sigmoid)
"""

SILU_ROTATE = rotated_op(
    "SiluRotate",
    "SiLU, x / (1 + exp(-x)), then HadamardRotate.",
    activated(_silu, _BODY),
)
