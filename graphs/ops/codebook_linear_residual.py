"""CodebookLinearResidual: y = residual + gate * CodebookLinear(x), rounded once: the last product of a branch."""

from graphs.ops.codebook_dequant import CODEBOOK
from graphs.ops.coded_weight import LINEAR_CASES
from graphs.ops.gated_residual import GATED_RESIDUAL
from graphs.ops.token_product import linear_op

CODEBOOK_LINEAR_RESIDUAL = linear_op(
    "CodebookLinearResidual",
    "CodebookLinear times gate, plus residual, in one node.",
    CODEBOOK,
    LINEAR_CASES,
    GATED_RESIDUAL,
)
