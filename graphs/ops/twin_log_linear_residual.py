"""TwinLogLinearResidual: y = residual + gate * TwinLogLinear(x), rounded once: the last product of a branch."""

from graphs.ops.coded_weight import LINEAR_CASES
from graphs.ops.gated_residual import GATED_RESIDUAL
from graphs.ops.token_product import linear_op
from graphs.ops.twin_log_dequant import TWIN_LOG

TWIN_LOG_LINEAR_RESIDUAL = linear_op(
    "TwinLogLinearResidual",
    "TwinLogLinear times gate, plus residual, in one node.",
    TWIN_LOG,
    LINEAR_CASES,
    GATED_RESIDUAL,
)
