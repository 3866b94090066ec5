"""Asymmetric uniform weights, 2^b evenly spaced values a row: the baseline of every paper, with and without a clip."""

from __future__ import annotations

import torch

from lrq_export.quant.codebook_weight import CodebookWeight, weighted_error
from lrq_export.quant.weight import checked_moment, checked_weight

CLIPS = tuple(torch.arange(20, 101, 2).div(100).tolist())  # parts of the row's range that are searched


def quantize(
    weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int, search: bool
) -> CodebookWeight:
    """Round W (rows, cols) to lo + k (hi - lo) / (2^b - 1), k = 0 .. 2^b - 1, for every row.

    [lo, hi] is the row's range, or with `search` the part of it (both ends times one factor) that minimises
    Σ_j h_j (w_j - ŵ_j)². The grid is not moved to hold zero exactly: it costs accuracy at few bits.
    """
    weight = checked_weight(weight)
    moment = checked_moment(second_moment, weight.shape[1])
    tried = [_round(weight, clip, bits) for clip in (CLIPS if search else (1.0,))]
    errors = torch.stack([weighted_error(weight, each.dequantize(), moment) for each in tried])
    best = errors.argmin(0)
    row = torch.arange(len(weight))
    codes, values = (torch.stack([getattr(each, part) for each in tried])[best, row] for part in ("codes", "values"))
    return CodebookWeight(codes, values)


def _round(weight: torch.Tensor, clip: float, bits: int) -> CodebookWeight:
    low, high = weight.amin(1, keepdim=True) * clip, weight.amax(1, keepdim=True) * clip
    top = 2**bits - 1
    step = ((high - low) / top).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.round((weight - low) / step).clamp_(0, top).to(torch.uint8)
    return CodebookWeight(codes, (low + step * torch.arange(top + 1))[:, None])
