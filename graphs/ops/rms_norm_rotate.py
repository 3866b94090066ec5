"""RMSNormRotate: y = HadamardRotate(rms_norm(x) * scale + shift), with rms_norm(x) = x / sqrt(mean(x^2) + epsilon).

Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation (4), over the last axis, in float32. The body
spells it out: ONNX has no RMSNormalization before opset 23.
"""

import numpy as np

from graphs.ops.modulated_norm import CASES, modulated_norm
from graphs.ops.rotated import rotated_op


def rms_norm(x: np.ndarray, epsilon: np.float32) -> np.ndarray:
    """x (..., n) float32 -> x / sqrt(mean(x^2) + epsilon), the mean over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)


_BODY = """
    epsilon_f = Constant<value_float: float = @epsilon>()
    last = Constant<value_ints = [-1]>()
    x_squares = Mul(x_f, x_f)
    mean_square = ReduceMean<keepdims = 1>(x_squares, last)
    mean_square_up = Add(mean_square, epsilon_f)
    size_of_token = Sqrt(mean_square_up)
    unit = Div(x_f, size_of_token)
"""

RMS_NORM_ROTATE = rotated_op(
    "RMSNormRotate",
    "x / sqrt(mean(x^2) + epsilon) over the last axis, times scale, plus shift, then HadamardRotate.",
    modulated_norm(rms_norm, _BODY),
    CASES,
)
