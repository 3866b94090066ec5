"""CodebookLinear: y = quantized(x R) w^T, scaled back, plus bias, w looked up in tables: the sibling of TwinLogLinear.

Made only by lowering; the rotation R may be fused in targets that run plugins.
"""

from graphs.ops.codebook_dequant import CODEBOOK
from graphs.ops.coded_weight import LINEAR_CASES
from graphs.ops.token_product import linear_op

CODEBOOK_LINEAR = linear_op(
    "CodebookLinear",
    "Per-token quantization, an integer product with weights looked up in tables, scales and bias, in one node.",
    CODEBOOK,
    LINEAR_CASES,
)
