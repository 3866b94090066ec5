"""Powers of two, and of the square root of two (RepQ-ViT, arXiv 2212.08254), made signed: w = ±δ 2^(-q / m), m = 1, 2.

q = clip(round(-m log2(|w| / δ)), 0, 2^(b-1) - 1): what is smaller takes the last level, where RepQ-ViT has 0. It takes
δ from the largest quantiles of its data; here it is searched among them for every (row, sign), the largest magnitude
included.
"""

from __future__ import annotations

import torch

from lrq_export.quant.codebook_weight import CodebookWeight
from lrq_export.quant.methods.log_grid import LogGrid, sides
from lrq_export.quant.weight import checked_bits, checked_moment, checked_weight

QUANTILES = (0.9, 0.95, 0.98, 0.99, 0.999, 0.9999, 1.0)


def quantize(
    weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int, per_octave: int = 1
) -> CodebookWeight:
    """Round W (rows, cols) to 2^(bits-1) levels a sign, `per_octave` (m) of them an octave."""
    weight = checked_weight(weight)
    moment = checked_moment(second_moment, weight.shape[1]).double()
    count, mask = 2 ** (checked_bits(bits) - 1), sides(weight)
    magnitudes = weight.abs()[:, None].expand_as(mask).masked_fill(~mask, torch.nan)
    tops = torch.nanquantile(magnitudes, torch.tensor(QUANTILES), dim=2).nan_to_num(0.0).clamp_min(1e-30)
    errors = []
    for top in tops:
        rounded = _round(weight, top, count, per_octave).dequantize()
        errors.append((((rounded - weight).double().square() * moment)[:, None] * mask).sum(2))
    best = torch.stack(errors).argmin(0, keepdim=True)
    return _round(weight, tops.gather(0, best)[0], count, per_octave)


def _round(weight: torch.Tensor, top: torch.Tensor, count: int, per_octave: int) -> CodebookWeight:
    """`top` (rows, 2) is δ."""
    unit = top.gather(1, (weight < 0).long())
    step = torch.full_like(top, 1 / per_octave)
    quantized = LogGrid(step, torch.full_like(top, 1.0 - count)).round(weight / unit, count)
    return CodebookWeight(quantized.codes, quantized.values * top.repeat_interleave(count, 1)[:, None])
