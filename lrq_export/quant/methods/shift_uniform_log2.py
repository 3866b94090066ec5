"""Shift-uniform-log2 (I&S-ViT, arXiv 2311.10126), made signed: uniform in log2(|w| + η) over each side's whole range.

The paper quantizes softmax outputs; for weights every (row, sign) gets a grid of its own, and the offset η of least
error over the tensor is taken.
"""

from __future__ import annotations

import math

import torch

from lrq_export.quant.codebook_weight import CodebookWeight, weighted_error
from lrq_export.quant.methods.log_grid import LogGrid, extremes, logarithm, sides
from lrq_export.quant.weight import checked_bits, checked_moment, checked_weight

OFFSETS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


def quantize(weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int) -> CodebookWeight:
    """Round W (rows, cols) to 2^(bits-1) levels a sign between the smallest and largest magnitude of each side."""
    weight = checked_weight(weight)
    moment = checked_moment(second_moment, weight.shape[1])
    count, mask = 2 ** (checked_bits(bits) - 1), sides(weight)
    tried = []
    for offset in OFFSETS:
        grid = LogGrid.between(*extremes(logarithm(weight, offset), mask, math.log2(offset)), count - 1, offset)
        tried.append(grid.round(weight, count))
    errors = [float(weighted_error(weight, each.dequantize(), moment).sum()) for each in tried]
    return tried[errors.index(min(errors))]
