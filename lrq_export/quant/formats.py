"""The weight formats of fewer than 8 bits that a package can hold, by the recipe's name for them (weights.method)."""

from graphs import names
from lrq_export.quant import codebook, twin_log

QUANTIZERS = {names.TWIN_LOG: twin_log.quantize, names.CODEBOOK: codebook.quantize}
