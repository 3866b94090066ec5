"""Signed uniform grids in the logarithm of a weight: what all logarithmic quantizers share.

With L = log2(|w| + η), every (row, sign) has a step s and a zero point z, and a code q, 0 <= q < n, stands for
±(2^(s (q + z)) - η). Rounding is to the nearest L, as the papers have it, not to the nearest w. A weight of zero counts
as positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrq_export.quant.codebook_weight import CodebookWeight

NOTHING = -100.0  # logarithm of the level of a side without weights
SMALLEST_STEP = 1e-6  # octaves: a side whose weights are all alike


@dataclass(frozen=True)
class LogGrid:
    """The grid of every (row, sign), sign 0 being +."""

    step: torch.Tensor  # float32 (rows, 2), octaves
    zero: torch.Tensor  # float32 (rows, 2), integers
    offset: float = 0.0  # η

    @classmethod
    def between(cls, low: torch.Tensor, high: torch.Tensor, intervals: int, offset: float = 0.0) -> LogGrid:
        """The grid whose `intervals` steps cover [low, high] (rows, 2), its points on multiples of the step."""
        step = ((high - low) / intervals).clamp_min(SMALLEST_STEP)
        return cls(step, torch.round(low / step), offset)

    def levels(self, count: int) -> torch.Tensor:
        """Magnitudes float32 (rows, 2, count)."""
        return torch.exp2(self.step[..., None] * (self.zero[..., None] + torch.arange(count))) - self.offset

    def round(self, weight: torch.Tensor, count: int) -> CodebookWeight:
        """W (rows, cols) in 2 · `count` values; the code of a negative weight is `count` + q."""
        negative = (weight < 0).long()
        step, zero = self.step.gather(1, negative), self.zero.gather(1, negative)
        index = torch.round(logarithm(weight, self.offset) / step) - zero
        levels = self.levels(count)
        codes = index.clamp_(0, count - 1) + count * negative
        return CodebookWeight(codes.to(torch.uint8), torch.cat([levels[:, 0], -levels[:, 1]], dim=1)[:, None])


def logarithm(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """log2(|w| + η); far below every grid, but finite, for a weight of zero and no offset."""
    return torch.log2((weight.abs() + offset).clamp_min(torch.finfo(torch.float32).tiny))


def sides(weight: torch.Tensor) -> torch.Tensor:
    """Whether each weight is of the sign, bool (rows, 2, cols); a weight of zero is of neither."""
    return torch.stack([weight > 0, weight < 0], dim=1)


def extremes(values: torch.Tensor, mask: torch.Tensor, empty_value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of values (rows, cols) where mask (rows, signs, cols) holds, (rows, signs).

    `empty_value` where it holds nowhere: of logarithms that of the offset, `NOTHING` without one, so that the side's
    level is 0 and a row of zeros stays one.
    """
    spread = values[:, None].expand_as(mask)
    low = spread.masked_fill(~mask, torch.inf).amin(2)
    high = spread.masked_fill(~mask, -torch.inf).amax(2)
    empty = ~mask.any(2)
    return low.masked_fill(empty, empty_value), high.masked_fill(empty, empty_value)
