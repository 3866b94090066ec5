"""Int8LinearResidual: y = residual + gate * Int8Linear(x), rounded once: the last product of a branch."""

from graphs.ops.gated_residual import GATED_RESIDUAL
from graphs.ops.int8_dequant import INT8
from graphs.ops.token_product import linear_op

INT8_LINEAR_RESIDUAL = linear_op(
    "Int8LinearResidual",
    "Int8Linear times gate, plus residual, in one node.",
    INT8,
    [(8, 4, 8), (6, 6, 13), (4, 6, 24)],
    GATED_RESIDUAL,
)
