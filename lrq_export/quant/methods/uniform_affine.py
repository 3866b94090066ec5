"""Asymmetric uniform weights, 2^b evenly spaced values a row or group: the baseline of every paper, clipped or not."""

from __future__ import annotations

import torch

from lrq_export.quant.codebook_weight import CodebookWeight, weighted_error
from lrq_export.quant.weight import checked_bits, checked_group_size, checked_moment, checked_weight

CLIPS = tuple(torch.arange(20, 101, 2).div(100).tolist())  # parts of the row's range that are searched


def quantize(
    weight: torch.Tensor,
    second_moment: torch.Tensor | None = None,
    *,
    bits: int,
    search: bool,
    group_size: int | None = None,
) -> CodebookWeight:
    """Round W (rows, cols) to lo + k (hi - lo) / (2^b - 1), k = 0 .. 2^b - 1, for every (row, group of columns).

    [lo, hi] is the group's range, or with `search` the part of it (both ends times one factor) that minimises
    Σ_j h_j (w_j - ŵ_j)². The grid is not moved to hold zero exactly: it costs accuracy at few bits.
    """
    weight = checked_weight(weight)
    rows, cols = weight.shape
    size, bits = checked_group_size(cols, group_size), checked_bits(bits)
    moment = checked_moment(second_moment, cols)
    parts, importance = weight.reshape(-1, size), moment.view(-1, size).repeat(rows, 1)
    tried = [_round(parts, clip, bits) for clip in (CLIPS if search else (1.0,))]
    errors = torch.stack([weighted_error(parts, each.dequantize(), importance) for each in tried])
    best, row = errors.argmin(0), torch.arange(len(parts))
    codes, values = (torch.stack([getattr(each, part) for each in tried])[best, row] for part in ("codes", "values"))
    return CodebookWeight(codes.view(rows, cols), values.view(rows, cols // size, -1))


def _round(weight: torch.Tensor, clip: float, bits: int) -> CodebookWeight:
    low, high = weight.amin(1, keepdim=True) * clip, weight.amax(1, keepdim=True) * clip
    top = 2**bits - 1
    step = ((high - low) / top).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.round((weight - low) / step).clamp_(0, top).to(torch.uint8)
    return CodebookWeight(codes, (low + step * torch.arange(top + 1))[:, None])
