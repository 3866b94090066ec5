"""Twin uniform (PTQ4ViT, arXiv 2111.12293), for weights: each sign has a uniform grid of its own.

The paper splits the outputs of GELU at zero and gives both sides a step; a weight's two sides are the same case. b bits
are a sign and b - 1 bits of magnitude, 0 <= q < 2^(b-1), and the clip of every (row, sign) is searched.
"""

from __future__ import annotations

import torch

from lrq_export.quant.codebook_weight import CodebookWeight
from lrq_export.quant.methods.log_grid import extremes, sides
from lrq_export.quant.weight import checked_bits, checked_moment, checked_weight

CLIPS = tuple((torch.arange(8, 41) / 40).tolist())  # parts of the side's largest magnitude: 0.2 to 1


def quantize(weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int) -> CodebookWeight:
    """Round W (rows, cols) to ±k s, k = 0 .. 2^(bits-1) - 1, with the s of each sign of least Σ_j h_j (w_j - ŵ_j)²."""
    weight = checked_weight(weight)
    moment = checked_moment(second_moment, weight.shape[1]).double()
    count, mask = 2 ** (checked_bits(bits) - 1), sides(weight)
    _, peak = extremes(weight.abs(), mask)
    steps = peak.clamp_min(1e-30) / (count - 1)
    errors = []
    for clip in CLIPS:
        rounded = _round(weight, steps * clip, count).dequantize()
        errors.append((((rounded - weight).double().square() * moment)[:, None] * mask).sum(2))
    best = torch.stack(errors).argmin(0)
    return _round(weight, steps * torch.tensor(CLIPS)[best], count)


def _round(weight: torch.Tensor, step: torch.Tensor, count: int) -> CodebookWeight:
    """`step` (rows, 2)."""
    negative = (weight < 0).long()
    index = torch.round(weight.abs() / step.gather(1, negative)).clamp_(max=count - 1)
    levels = step[..., None] * torch.arange(count)
    values = torch.cat([levels[:, 0], -levels[:, 1]], dim=1)[:, None]
    return CodebookWeight((index + count * negative).to(torch.uint8), values)
