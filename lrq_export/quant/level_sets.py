"""Every magnitude level set that three small integers can express, listed once per bit width.

A level set is what one (row, group, sign) decodes to: q -> m_q, q in [0, 2^(bits-1)), 0 <= m_0 <= m_1 <= ... <= 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch

from lrq_export.quant.weight import LARGEST

FRACTION_BITS = 4  # F: exponents count in units of 2^-4 octaves
INTEGER_BITS = 6  # I: 2^r is held as M[r] = round(2^(r / 2^F + I)), in 64..123

MAX_SHIFT = 8  # M < 2^7: further left is beyond 127 plus any offset, further right is 0

# Exponent -128 is 2^-8, which rounds to 0: every code decodes to zero.
ZERO_SET = (-128, 0, 0)


def magnitudes(exponents: torch.Tensor, bits: int) -> torch.Tensor:
    """m int64 (..., 2^(bits-1)) of exponents (..., 3) = (base, step, offset); the shift decode, equations (7)-(10).

    v = base + step q;  f = v >> F, r = v & (2^F - 1)  (8);  M[r] = round(2^(r / 2^F + I))  (9);
    m = SHIFT(M[r], f - I) - offset  (10), right shifts rounding half up.
    """
    base, step, offset = exponents.long().unsqueeze(-1).unbind(-2)
    v = base + step * torch.arange(2 ** (bits - 1))
    fraction = torch.arange(2**FRACTION_BITS, dtype=torch.float64) / 2**FRACTION_BITS
    mantissa = torch.round(2 ** (fraction + INTEGER_BITS)).long()[v & (2**FRACTION_BITS - 1)]
    shift = (v >> FRACTION_BITS) - INTEGER_BITS
    left, right = shift.clamp(0, MAX_SHIFT), (-shift).clamp(0, MAX_SHIFT)
    half = torch.bitwise_left_shift(torch.ones_like(right), right) >> 1  # 0 when nothing is shifted out
    return (torch.bitwise_left_shift(mantissa, left) + half >> right) - offset


@dataclass(frozen=True)
class LevelSets:
    """N distinct level sets; the first one is all zeros. K = 2^(bits-1)."""

    exponents: torch.Tensor  # int8 (N, 3)
    levels: torch.Tensor  # int64 (N, K)

    @cached_property
    def middles(self) -> torch.Tensor:
        """int64 (N, K-1): decision points between neighbours in half units, m_(k-1) + m_k, in 0..254."""
        return self.levels[:, 1:] + self.levels[:, :-1]

    @cached_property
    def rises(self) -> torch.Tensor:
        """float32 (N, K-1): m_k - m_(k-1)."""
        return self.levels.diff(dim=1).float()

    @cached_property
    def tops(self) -> torch.Tensor:
        """float32 (N,): the largest level."""
        return self.levels[:, -1].float()


@cache
def valid_sets(bits: int) -> LevelSets:
    """All distinct valid level sets; of equal ones, the one with the smallest |offset|. Sorted by levels."""
    steps = 255 // (2 ** (bits - 1) - 1)
    base, step = torch.meshgrid(torch.arange(-128, 128), torch.arange(min(steps, 127) + 1), indexing="ij")
    exponents = torch.stack([base, step, torch.zeros_like(base)], dim=-1).flatten(0, 1)
    exponents = exponents[exponents[:, 0] + exponents[:, 1] * (2 ** (bits - 1) - 1) <= 127]
    # A top level of 127 with an offset of 127 is 254 = 2^(127.8 / 16): no exponent above 127 was valid.
    unshifted = _distinct(exponents, magnitudes(exponents, bits))
    found_exponents, found_levels = [], []
    for offset in sorted(range(-127, 128), key=abs):
        shifted = unshifted.levels - offset
        inside = (shifted[:, 0] >= 0) & (shifted[:, -1] <= LARGEST)
        found_levels.append(shifted[inside])
        found_exponents.append(unshifted.exponents[inside] + torch.tensor([0, 0, offset], dtype=torch.int8))
    return _distinct(torch.cat(found_exponents), torch.cat(found_levels))


@cache
def searched_sets(bits: int) -> LevelSets:
    """The sets worth searching (4,000 to 13,000): all zeros, and those whose first level lies within one rise of zero.

    Weights are densest near zero, so a first level further out than its neighbour is wasted on every such row.
    """
    every = valid_sets(bits)
    chosen = every.levels[:, 0] <= every.rises[:, 0] + 1
    chosen &= every.levels[:, -1] > 0
    zero = torch.tensor([ZERO_SET], dtype=torch.int8)
    return LevelSets(
        torch.cat([zero, every.exponents[chosen]]), torch.cat([magnitudes(zero, bits), every.levels[chosen]])
    )


def _distinct(exponents: torch.Tensor, levels: torch.Tensor) -> LevelSets:
    """The first occurrence of each row of `levels` (0..254), sorted."""
    key = torch.zeros(len(levels), dtype=torch.int64)
    for level in levels.unbind(1):
        key = (key << 8) | level  # up to eight levels of eight bits: unique in 64 bits
    distinct, group = torch.unique(key, return_inverse=True)
    first = torch.full((len(distinct),), len(levels)).scatter_reduce_(0, group, torch.arange(len(levels)), "amin")
    return LevelSets(exponents[first].to(torch.int8), levels[first])
