"""GegluRotate: y = HadamardRotate(hidden * gelu(gate)), x = [hidden, gate] along the last axis, as in diffusers' GEGLU.

Shazeer, GLU Variants Improve Transformer, 2020, equation (5), with the exact GELU.
"""

import numpy as np

from graphs.ops.activated import activated
from graphs.ops.gelu_rotate import gelu
from graphs.ops.rotated import rotated_op


def _geglu(x: np.ndarray) -> np.ndarray:
    hidden, gate = np.split(x, 2, axis=-1)
    return hidden * gelu(gate)


_BODY = """
    hidden, gate = Split<axis = -1, num_outputs = 2>(x_f)
    gate_active = Gelu(gate)
    active = Mul(hidden, gate_active)
"""

GEGLU_ROTATE = rotated_op(
    "GegluRotate",
    "The first half of the channels times the exact GELU of the second half, then HadamardRotate.",
    activated(_geglu, _BODY, parts=2),
)
