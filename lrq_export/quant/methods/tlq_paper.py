"""Twin-Log as LRQ-DiT's text has it (arXiv 2508.03485, equations (1)-(10)): no offset, clips on the linear maximum.

    (1), (4)-(7)   W = ±2^(s (q + z)), s and z of each sign, fitted to the range of log2|W|
    (8)-(10)       2^(s (q + z)) ≈ 2^(f - I) M,  M = round(2^(r + I)), f and r the whole and fractional part; I = 6 here
    α, β           scale the largest positive and negative magnitude of the range; searched, here for every row

The text gives neither I nor the grid of α and β. A row's smallest weight lies many octaves below its largest, so the
few levels crowd where nothing is: see `tlq_released` and `twin_log` for what was done about it.
"""

from __future__ import annotations

import torch

from lrq_export.quant.codebook_weight import CodebookWeight
from lrq_export.quant.methods.log_grid import NOTHING, LogGrid, extremes, logarithm, sides
from lrq_export.quant.weight import checked_bits, checked_moment, checked_weight

CLIPS = tuple((torch.arange(6, 21) / 20).tolist())  # α and β: 0.3 to 1
INTEGER_BITS = 6


def quantize(weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int) -> CodebookWeight:
    """Round W (rows, cols) to 2^(bits-1) levels a sign, with the α and β of each row of least Σ_j h_j (w_j - ŵ_j)²."""
    weight = checked_weight(weight)
    moment = checked_moment(second_moment, weight.shape[1]).double()
    count, mask, logs = 2 ** (checked_bits(bits) - 1), sides(weight), logarithm(weight, 0.0)
    low, high = extremes(logs, mask, NOTHING)
    errors = []
    for clip in CLIPS:
        rounded = _round(weight, low, high + torch.tensor(clip).log2(), count).dequantize()
        squares = (rounded - weight).double().square() * moment
        errors.append((squares[:, None] * mask).sum(2))
    best = torch.stack(errors).argmin(0)  # (rows, 2): the signs do not depend on each other
    return _round(weight, low, high + torch.tensor(CLIPS).log2()[best], count)


def _round(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, count: int) -> CodebookWeight:
    quantized = LogGrid.between(low, torch.maximum(high, low), count - 1).round(weight, count)
    return CodebookWeight(quantized.codes, _shifted_integers(quantized.values))


def _shifted_integers(values: torch.Tensor) -> torch.Tensor:
    """Equations (8)-(10): the fractional power of two as an integer of I bits, shifted."""
    magnitude = values.abs()
    whole = torch.floor(torch.log2(magnitude))
    mantissa = torch.round(magnitude / torch.exp2(whole) * 2**INTEGER_BITS)
    return values.sign() * mantissa * torch.exp2(whole - INTEGER_BITS)
