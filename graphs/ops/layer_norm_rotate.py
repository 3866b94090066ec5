"""LayerNormRotate: y = HadamardRotate(layer_norm(x) * scale + shift), a layer norm without affine parameters.

Ba, Kiros and Hinton, Layer Normalization, 2016, equation (4), over the last axis, in float32.
"""

import numpy as np

from graphs.ops.modulated_norm import CASES, modulated_norm
from graphs.ops.rms_norm_rotate import rms_norm
from graphs.ops.rotated import rotated_op


def _layer_norm(x: np.ndarray, epsilon: np.float32) -> np.ndarray:
    return rms_norm(x - x.mean(axis=-1, keepdims=True), epsilon)


_BODY = """
    channels = Shape(signs)
    no_scale = Expand(onef, channels)
    unit = LayerNormalization<axis = -1, epsilon: float = @epsilon>(x_f, no_scale)
"""

LAYER_NORM_ROTATE = rotated_op(
    "LayerNormRotate",
    "Layer norm over the last axis, times scale, plus shift, then HadamardRotate.",
    modulated_norm(_layer_norm, _BODY),
    CASES,
)
