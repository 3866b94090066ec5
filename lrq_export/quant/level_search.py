"""For every (row, sign) and every clip, the level set with the smallest weighted squared error.

Magnitudes are measured in half units, y = 2 |w| / scale, because levels are integers and decision points therefore
multiples of 1/2. With the weighted prefix sums H[m] = sum_{y < m} h and Y[m] = sum_{y < m} h y, the error of a set
m_0 <= ... <= m_(K-1) against the best it could do is, after summation by parts,

    sum h (|w|/scale - m_q)^2 = sum h y^2 / 4 - gain,
    gain = m_top Y_total - m_top^2 H_total + sum_k (m_k - m_(k-1)) D[m_k + m_(k-1)],     D[m] = m H[m] - Y[m]

so a candidate costs K lookups in one small table, with no search at all. A histogram `fine` times finer than half units
serves every clip whose factor is a multiple of 1 / fine: clip p / fine reads H at the indices m p.

Candidates come from shortlists: (row, sign) pairs are pooled into buckets by mean and spread of their magnitudes, all
level sets are tried on the pooled histogram of each bucket, and only the best few on each member.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lrq_export.quant.level_sets import LevelSets
from lrq_export.quant.weight import LARGEST

HALF_UNITS = 2 * LARGEST  # the largest decision point
CHUNK_WEIGHTS = 1 << 19  # weights read at a time; results do not depend on it
MEAN_BUCKETS, SPREAD_BUCKETS = 48, 24
MEAN_RATIO = 1.12  # neighbouring buckets differ by this factor in mean magnitude


@dataclass(frozen=True)
class Magnitudes:
    """Rows to search. `units` is what the largest level of an unclipped row stands for, 127 scale units."""

    weight: torch.Tensor  # float32 (rows, n)
    units: torch.Tensor  # float32 (rows,), positive
    moment: torch.Tensor  # float32 (periods, n): importance h of each weight; row r reads row r mod periods

    def chunks(self) -> Iterator[slice]:
        """Slices over the rows that bound the memory of one step."""
        rows, cols = self.weight.shape
        size = max(1, CHUNK_WEIGHTS // max(cols, 512))
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))

    def split(self, size: int, units: torch.Tensor) -> Magnitudes:
        """Every group of `size` columns as a row of its own, with its own units (rows * groups,)."""
        return Magnitudes(self.weight.view(-1, size), units, self.moment.view(-1, size))

    def half_units(self, rows: slice) -> torch.Tensor:
        """y float32 (chunk, n): 0..254 unless |w| exceeds `units`."""
        return self.weight[rows].abs() * (HALF_UNITS / self.units[rows])[:, None]

    def importance(self, rows: slice) -> torch.Tensor:
        """h float32 (chunk, n)."""
        return self.moment[torch.arange(rows.start, rows.stop) % len(self.moment)]


@dataclass(frozen=True)
class Sums:
    """Prefix sums of (row, sign) pairs, exclusive: index m counts what lies below m / fine half units."""

    h: torch.Tensor  # float32 (pairs, 254 fine + 2); the last column is the total
    y: torch.Tensor  # the same for h y
    bucket: torch.Tensor  # int64 (pairs,)

    def decision_table(self, fine: int, clip: int) -> torch.Tensor:
        """D float32 (pairs, 255) when the scale is clip / fine of the unclipped one."""
        reach = HALF_UNITS * clip + 1
        points = torch.arange(HALF_UNITS + 1, dtype=torch.float32)
        return points * self.h[:, :reach:clip] - self.y[:, :reach:clip] * (fine / clip)


def prefix_sums(source: Magnitudes, rows: slice, fine: int) -> Sums:
    """Histogram one chunk: pairs are (row, +), (row, -) in that order."""
    half_units, importance = source.half_units(rows), source.importance(rows)
    count, bins = len(half_units), HALF_UNITS * fine + 2
    side = (source.weight[rows] < 0).long()
    index = (half_units * fine).clamp_(max=HALF_UNITS * fine).long().add_(1).add_(side, alpha=bins)
    weighted = importance * half_units
    h = torch.zeros(count, 2 * bins).scatter_add_(1, index, importance).view(-1, bins).cumsum(1)
    y = torch.zeros(count, 2 * bins).scatter_add_(1, index, weighted).view(-1, bins).cumsum(1)
    square = torch.zeros(count, 2).scatter_add_(1, side, weighted * half_units).view(-1)
    return Sums(h, y, _bucket(h[:, -1], y[:, -1], square))


def _bucket(h: torch.Tensor, y: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Bucket int64 (pairs,) by mean of y (logarithmic) and by mean^2 / mean square (0..1: light tails are near 1)."""
    mean = y / h.clamp(min=1e-30)
    octaves = torch.log(HALF_UNITS / mean.clamp(min=1e-3)) / math.log(MEAN_RATIO)
    spread = mean * y / square.clamp(min=1e-30) * SPREAD_BUCKETS
    return octaves.long().clamp(0, MEAN_BUCKETS - 1) * SPREAD_BUCKETS + spread.long().clamp(0, SPREAD_BUCKETS - 1)


def gains(table: torch.Tensor, h: torch.Tensor, y: torch.Tensor, sets: LevelSets, ids: torch.Tensor) -> torch.Tensor:
    """gain float32 (pairs, T), in squared units, of the candidates ids (pairs, T) or (T,).

    table (pairs, 255) is D; h and y (pairs,) are the totals, y in half units of this clip.
    """
    ids = ids.expand(len(table), -1)
    tops = sets.tops[ids]
    gain = tops * (y[:, None] - tops * h[:, None])
    for middle, rise in zip(sets.middles.unbind(1), sets.rises.unbind(1), strict=True):
        gain += table.gather(1, middle[ids]).mul_(rise[ids])
    return gain


def gains_of_all(table: torch.Tensor, h: torch.Tensor, y: torch.Tensor, sets: LevelSets) -> torch.Tensor:
    """`gains` of every set for all pairs, (pairs, sets): the same numbers, several times as fast.

    All pairs look up the same entries, which lie side by side when the table is turned.
    """
    entries, tops = table.T.contiguous(), sets.tops[:, None]
    gain = tops * (y - tops * h)  # (sets, pairs)
    for middle, rise in zip(sets.middles.T.contiguous(), sets.rises.T, strict=True):
        gain += entries.index_select(0, middle).mul_(rise[:, None])
    return gain.T.contiguous()


def search(
    source: Magnitudes, sets: LevelSets, *, fine: int, clips: tuple[int, ...], candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best set of every (row, sign) for every clip: gain float32 and index int64, both (rows, 2, clips).

    Gains are in squared units of the unclipped scale, so that they compare between clips. A sign without any nonzero
    weight takes set 0, all zeros.
    """
    shortlist = _shortlists(source, sets, fine, clips, candidates)
    gain = torch.empty(len(source.weight), 2, len(clips))
    best = torch.empty(len(source.weight), 2, len(clips), dtype=torch.int64)
    for rows in source.chunks():
        sums = prefix_sums(source, rows, fine)
        for position, clip in enumerate(clips):
            ids = shortlist[sums.bucket, position]
            table = sums.decision_table(fine, clip)
            found, where = gains(table, sums.h[:, -1], sums.y[:, -1] * (fine / clip), sets, ids).max(1)
            gain[rows, :, position] = found.view(-1, 2) * (clip / fine) ** 2
            index = ids.gather(1, where[:, None])[:, 0]
            best[rows, :, position] = index.masked_fill_(sums.y[:, -1] == 0, 0).view(-1, 2)
    return gain, best


def _shortlists(
    source: Magnitudes, sets: LevelSets, fine: int, clips: tuple[int, ...], candidates: int
) -> torch.Tensor:
    """int64 (buckets, clips, candidates): the sets with the largest gain on each bucket's pooled histogram."""
    buckets, bins = MEAN_BUCKETS * SPREAD_BUCKETS, HALF_UNITS * fine + 2
    most = min(buckets, 2 * len(source.weight))
    h, y, slot_of = torch.zeros(most, bins), torch.zeros(most, bins), torch.full((buckets,), -1)
    occupied = torch.empty(0, dtype=torch.int64)  # in the order in which they were seen; slots are numbered by it
    for rows in source.chunks():
        sums = prefix_sums(source, rows, fine)
        found = sums.bucket.unique()
        occupied = torch.cat([occupied, found[slot_of[found] < 0]])
        slot_of[occupied] = torch.arange(len(occupied))
        slots = slot_of[sums.bucket]
        h.index_add_(0, slots, sums.h)
        y.index_add_(0, slots, sums.y)
    pooled = Sums(h[: len(occupied)], y[: len(occupied)], occupied)
    shortlist = torch.zeros(buckets, len(clips), candidates, dtype=torch.int64)
    for position, clip in enumerate(clips):
        table = pooled.decision_table(fine, clip)
        gain = gains_of_all(table, pooled.h[:, -1], pooled.y[:, -1] * (fine / clip), sets)
        shortlist[occupied, position] = gain.topk(candidates, dim=1).indices
    return shortlist
