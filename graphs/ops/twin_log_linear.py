"""TwinLogLinear: y = quantized(x R) w^T, scaled back, plus bias, with w decoded from twin-log codes: one plugin call.

Made only by lowering. Its numbers are those of `TwinLogDequant` (the integers w) and `token_product`. The rotation R
may be fused (`rotation="hadamard"`) in targets that run plugins; the body computes `rotation="none"` only.
"""

from graphs.ops.coded_weight import LINEAR_CASES
from graphs.ops.token_product import linear_op
from graphs.ops.twin_log_dequant import TWIN_LOG

TWIN_LOG_LINEAR = linear_op(
    "TwinLogLinear",
    "Per-token quantization, an integer product with decoded twin-log weights, scales and bias, in one node.",
    TWIN_LOG,
    LINEAR_CASES,
)
