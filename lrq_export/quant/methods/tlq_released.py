"""Twin-Log as LRQ-DiT's authors released it, which is not what the text says; described in docs/methods.md.

L = log2(|W| + η) with η searched per tensor; percentiles of L, the other sign's places filled with 0, give each row's
range; b bits are a sign and b - 1 bits of magnitude. Unless weights exceed 1 - η, the fill makes every percentile 0:
the grid is then anchored at 2^0 and only η is searched.
"""

from __future__ import annotations

import torch

from lrq_export.quant.codebook_weight import CodebookWeight
from lrq_export.quant.methods.log_grid import LogGrid, logarithm, sides
from lrq_export.quant.weight import checked_bits, checked_moment, checked_weight

OFFSETS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
PERCENTILES = (0.98, 0.99, 0.999, 0.9999, 0.99999)


def quantize(
    weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int, exact_codes: bool = True
) -> CodebookWeight:
    """Round W (rows, cols) with the η and percentiles of least error over the whole tensor.

    The released code gives negative weights one level more than bits allow, and exact zeros a state of their own:
    2^b + 2 values in all. `exact_codes` keeps to 2^(b-1) levels a sign; False does as released, which weighs all errors
    alike; `second_moment`, if given, weighs them by column.
    """
    weight = checked_weight(weight)
    moment = checked_moment(second_moment, weight.shape[1]).double()
    count, mask = 2 ** (checked_bits(bits) - 1), sides(weight)
    extra = 0 if exact_codes else 1
    best: tuple[float, LogGrid] | None = None
    for offset in OFFSETS:
        filled = torch.where(mask, logarithm(weight, offset)[:, None], 0.0)  # (rows, 2, cols)
        low = filled.amin(2)
        errors, grids = [], []
        for percentile in PERCENTILES:
            high = torch.quantile(filled, percentile, dim=2, interpolation="nearest")
            grids.append(LogGrid.between(low, high, count, offset))
            squares = (grids[-1].round(weight, count + extra).dequantize() - weight).double().square() * moment
            errors.append((squares[:, None] * mask).sum((0, 2)))
        chosen = torch.stack(errors).argmin(0)  # percentile of each sign, for the whole tensor
        error = float(torch.stack(errors).amin(0).sum())
        if best is None or error < best[0]:
            step, zero = (
                torch.stack([getattr(grids[chosen[sign]], part)[:, sign] for sign in (0, 1)], dim=1)
                for part in ("step", "zero")
            )
            best = error, LogGrid(step, zero, offset)
    if not exact_codes:
        return _as_released(weight, best[1], count)
    rounded = best[1].round(weight, count)
    empty = ~mask.any(2).repeat_interleave(count, 1)[:, None]  # a row of zeros stays one
    return CodebookWeight(rounded.codes, rounded.values.masked_fill(empty, 0))


def _as_released(weight: torch.Tensor, grid: LogGrid, count: int) -> CodebookWeight:
    """`count` positive levels, one more negative one, and zero, in this order."""
    rounded = grid.round(weight, count + 1)  # as many levels on both sides; the last positive one is not to be had
    codes = rounded.codes.int()
    codes = torch.where(codes <= count, codes.clamp_max(count - 1), codes - 1)
    codes = torch.where(weight == 0, 2 * count + 1, codes)
    levels = rounded.values
    values = torch.cat([levels[..., :count], levels[..., count + 1 :], torch.zeros(len(weight), 1, 1)], dim=2)
    return CodebookWeight(codes.to(torch.uint8), values)
