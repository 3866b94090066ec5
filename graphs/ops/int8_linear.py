"""Int8Linear: y = quantized(x R) w^T, scaled back, plus bias, for plain INT8 weights: the sibling of TwinLogLinear."""

from graphs.ops.int8_dequant import INT8
from graphs.ops.token_product import linear_op

INT8_LINEAR = linear_op(
    "Int8Linear",
    "Per-token quantization, an integer product with INT8 weights, scales and bias, in one node.",
    INT8,
    [(8, 6, 24), (6, 6, 13), (4, 6, 24)],
)
