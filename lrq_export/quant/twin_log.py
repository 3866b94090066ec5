"""Twin-Log weights: b-bit codes on logarithmic levels, fitted separately to positive and negative weights.

LRQ-DiT (arXiv 2508.03485), equations (7)-(10), on the integer grid of the `TwinLogDequant` op. A code is a sign bit
(most significant) and a magnitude index q of b - 1 bits; (row, group, sign) has small integers base, step, offset:

    v = base + step q          exponent in units of 2^-4 octaves          (8), with f = v >> 4 and r = v & 15
    m = SHIFT(M[r], f - 6) - offset,   M[r] = round(2^(r/16 + 6))         (9), (10); offset is the paper's log offset
    W = scale[row] * (+-m),   0 <= m <= 127                               (7)

The paper's clips alpha and beta are searched: the row's scale, and the top level of each sign.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lrq_export.errors import UsageError
from lrq_export.quant import weight as weights
from lrq_export.quant.level_search import HALF_UNITS, Magnitudes, search
from lrq_export.quant.level_sets import LevelSets, magnitudes, searched_sets
from lrq_export.quant.weight import LARGEST, SMALLEST

BITS = (2, 3, 4)
FINE = 16  # clips are sixteenths of the row's largest magnitude
CLIPS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16)
CANDIDATES = 64  # level sets tried on each (row, sign, clip)
GROUP_CLIPS = (1.0, 1.25, 1.6, 2.1)  # tried on grouped rows, times the ungrouped row's best: some groups reach further


@dataclass(frozen=True)
class TwinLogWeight:
    """A weight (rows, cols) in 2^bits values for every (row, group)."""

    codes: torch.Tensor  # uint8 (rows, cols), 0 <= code < 2^bits
    exponents: torch.Tensor  # int8 (rows, groups, 2, 3): (+, -) x (base, step, offset)
    scale: torch.Tensor  # float32 (rows,)
    bits: int
    group_size: int

    def integer_weight(self) -> torch.Tensor:
        """int8 (rows, cols); see `QuantizedWeight`."""
        return integer_weight(self)

    def codebooks(self) -> torch.Tensor:
        """The value of every code, float32 (rows, groups, 2^bits)."""
        return _signed(level_table(self.exponents, self.bits).float()) * self.scale[:, None, None]

    def rerounded(self, codes: torch.Tensor, widening: torch.Tensor) -> TwinLogWeight:
        """Other codes (rows, cols) on the same levels, each row's scale times its widening (rows,)."""
        return replace(self, codes=codes, scale=self.scale * widening)


def level_table(exponents: torch.Tensor, bits: int) -> torch.Tensor:
    """Magnitudes int16 (rows, groups, 2, 2^(bits-1)) of exponents int8 (rows, groups, 2, 3)."""
    return magnitudes(exponents, bits).to(torch.int16)


def integer_weight(quantized: TwinLogWeight) -> torch.Tensor:
    """+-m, int8 (rows, cols)."""
    levels = level_table(quantized.exponents, quantized.bits).to(torch.int8)
    return _look_up(_signed(levels), quantized.codes)


def dequantize(quantized: TwinLogWeight) -> torch.Tensor:
    """W float32 (rows, cols)."""
    return weights.dequantize(quantized)


def quantize(
    weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int, group_size: int | None = None
) -> TwinLogWeight:
    """The codes with the smallest sum_j h_j (W_rj - What_rj)^2 that the search finds, for every row of W (rows, cols).

    second_moment h (cols,) is the mean square of each input channel, in the basis in which the weight is given; None
    counts all columns alike. group_size None means one group a row. Deterministic; memory is bounded by row chunks.
    Raises UsageError for an impossible bits or group_size, InputError for values that are not finite.
    """
    weight = weights.checked_weight(weight)
    rows, cols = weight.shape
    if bits not in BITS:
        raise UsageError(f"twin-log bits: got {bits}, needed one of {', '.join(map(str, BITS))}")
    size = weights.checked_group_size(cols, group_size)
    moment = weights.checked_moment(second_moment, cols)
    sets = searched_sets(bits)
    peak = weight.abs().amax(1)
    peak[peak < SMALLEST] = LARGEST  # scale 1; the all-zero level set is the best one for such a row
    whole = Magnitudes(weight, peak, moment[None])
    gain, best = search(whole, sets, fine=FINE, clips=CLIPS, candidates=CANDIDATES)
    winner = gain.sum(1).argmax(1)
    clip = torch.tensor(CLIPS)[winner] * (peak / FINE)
    if size < cols:
        return _fit(whole, *_search_groups(whole, sets, clip, size), bits)
    return _fit(whole, clip, sets, best[torch.arange(rows), :, winner][:, None], bits)


def _search_groups(
    whole: Magnitudes, sets: LevelSets, clip: torch.Tensor, size: int
) -> tuple[torch.Tensor, LevelSets, torch.Tensor]:
    """The clip (rows,) near the given one whose groups fit best, and their sets (rows, groups, 2)."""
    rows, cols = whole.weight.shape
    tried, totals, found = torch.tensor(GROUP_CLIPS)[:, None] * clip, [], []
    for units in tried:
        groups = whole.split(size, units.repeat_interleave(cols // size))
        gain, best = search(groups, sets, fine=1, clips=(1,), candidates=CANDIDATES)
        totals.append(gain.view(rows, -1).double().sum(1) * units.double() ** 2)
        found.append(best.view(rows, -1, 2))
    winner, row = torch.stack(totals).argmax(0), torch.arange(rows)
    return tried[winner, row], sets, torch.stack(found)[winner, row]


def _fit(whole: Magnitudes, clip: torch.Tensor, sets: LevelSets, chosen: torch.Tensor, bits: int) -> TwinLogWeight:
    """Assign codes, refit every row's scale to them by least squares, assign again: the error only falls.

    clip float32 (rows,) is 127 times the scale; chosen int64 (rows, groups, 2) indexes the sets.
    """
    rows, cols = whole.weight.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scale = torch.empty(rows)
    for part in whole.chunks():
        weight, picked = whole.weight[part], chosen[part]
        code_of = _code_table(sets.middles[picked], bits)
        values = _signed(sets.levels[picked].float())
        rough = clip[part] / LARGEST
        integers = _look_up(values, _assign(weight, rough, code_of))
        scale[part] = _least_squares(weight, integers, whole.moment, rough)
        codes[part] = _assign(weight, scale[part], code_of)
    return TwinLogWeight(codes, sets.exponents[chosen], scale, bits, cols // chosen.shape[1])


def _code_table(middles: torch.Tensor, bits: int) -> torch.Tensor:
    """Code uint8 (rows, groups, 510) of a weight whose index is sign * 255 + floor(half units); ties go up."""
    points = torch.arange(HALF_UNITS + 1)
    index = torch.searchsorted(middles.contiguous(), points.expand(*middles.shape[:-1], -1).contiguous(), right=True)
    index[:, :, 1] += 2 ** (bits - 1)
    return index.to(torch.uint8).flatten(2)


def _assign(weight: torch.Tensor, scale: torch.Tensor, code_of: torch.Tensor) -> torch.Tensor:
    """The code uint8 (rows, cols) of the level nearest to each weight; zero counts as positive."""
    index = (weight.abs() * (2 / scale)[:, None]).clamp_(max=HALF_UNITS).long()
    return _look_up(code_of, index.add_(weight < 0, alpha=HALF_UNITS + 1))


def _signed(levels: torch.Tensor) -> torch.Tensor:
    """Integer weight of every code, (rows, groups, 2^bits), from levels (rows, groups, 2, 2^(bits-1))."""
    return torch.cat([levels[:, :, 0], -levels[:, :, 1]], dim=-1)


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[row, group of the column, index[row, column]] for table (rows, groups, n) and index (rows, cols)."""
    rows, groups, _ = table.shape
    return table.gather(2, index.long().view(rows, groups, -1)).view(rows, -1)


def _least_squares(
    weight: torch.Tensor, integers: torch.Tensor, moment: torch.Tensor, otherwise: torch.Tensor
) -> torch.Tensor:
    """Scale float32 (rows,) that minimises sum h (w - scale m)^2; `otherwise` where every m is zero."""
    weighted = integers.double() * moment
    along, energy = (weighted * weight).sum(1), (weighted * integers).sum(1)
    return torch.where(along > 0, along / energy, otherwise.double()).float()
