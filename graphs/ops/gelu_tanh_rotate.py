"""GeluTanhRotate: y = HadamardRotate(gelu_tanh(x)), the GELU of most diffusion transformers.

Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, section 2: the approximation by a tanh.
"""

import numpy as np

from graphs.ops.activated import activated
from graphs.ops.rotated import rotated_op


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


GELU_TANH_ROTATE = rotated_op(
    "GeluTanhRotate",
    "The GELU with a tanh, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, then HadamardRotate.",
    activated(_gelu_tanh, '    active = Gelu<approximate = "tanh">(x_f)'),
)
