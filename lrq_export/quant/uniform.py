"""Symmetric INT8 weights with one scale a row, clipped where that lowers the weighted error (`w8` recipes)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrq_export.quant import weight as weights
from lrq_export.quant.level_search import Magnitudes
from lrq_export.quant.weight import SMALLEST

CLIPS = (1.0, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # parts of the row's largest magnitude


@dataclass(frozen=True)
class Int8Weight:
    """W (rows, cols) = scale[row] * codes."""

    codes: torch.Tensor  # int8 (rows, cols), -127..127
    scale: torch.Tensor  # float32 (rows,)

    def integer_weight(self) -> torch.Tensor:
        """The codes themselves; see `QuantizedWeight`."""
        return self.codes


def quantize(weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int = 8) -> Int8Weight:
    """Round W (rows, cols) to +-(2^(bits-1) - 1) levels a row, with the clip that minimises sum_j h_j (W - What)^2.

    second_moment h (cols,) as in `twin_log.quantize`. Fewer bits than 8 make the uniform baseline that
    Twin-Log must beat.
    """
    weight = weights.checked_weight(weight)
    moment = weights.checked_moment(second_moment, weight.shape[1]).double()
    top = 2 ** (weights.checked_bits(bits) - 1) - 1
    peak = weight.abs().amax(1)
    scale = torch.ones(len(weight))
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for rows in Magnitudes(weight, peak, moment[None]).chunks():
        part = weight[rows]
        tried = torch.where(peak[rows] < SMALLEST, 1.0, peak[rows] / top)[:, None] * torch.tensor(CLIPS)
        errors = torch.stack([_error(part, moment, clipped, top) for clipped in tried.unbind(1)], dim=1)
        best = errors.argmin(1, keepdim=True)
        scale[rows] = tried.gather(1, best)[:, 0]
        codes[rows] = _round(part, scale[rows], top).to(torch.int8)
    return Int8Weight(codes, scale)


def integer_weight(quantized: Int8Weight) -> torch.Tensor:
    """int8 (rows, cols)."""
    return quantized.integer_weight()


def dequantize(quantized: Int8Weight) -> torch.Tensor:
    """W float32 (rows, cols)."""
    return weights.dequantize(quantized)


def _error(weight: torch.Tensor, moment: torch.Tensor, scale: torch.Tensor, top: int) -> torch.Tensor:
    return ((_round(weight, scale, top) * scale[:, None] - weight).double().square() * moment).sum(1)


def _round(weight: torch.Tensor, scale: torch.Tensor, top: int) -> torch.Tensor:
    return torch.round(weight / scale[:, None]).clamp_(-top, top)
