"""A weight as codes into a table of values: the one form in which all quantizers can be compared.

The tables of deployable formats hold integers times a scale; a method from a paper may hold any floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CodebookWeight:
    """W (rows, cols) = values[row, group of the column, codes]."""

    codes: torch.Tensor  # uint8 (rows, cols)
    values: torch.Tensor  # float32 (rows, groups, n)

    def dequantize(self) -> torch.Tensor:
        """W float32 (rows, cols)."""
        rows, groups, _ = self.values.shape
        return self.values.gather(2, self.codes.long().view(rows, groups, -1)).view(rows, -1)

    def codebooks(self) -> torch.Tensor:
        return self.values

    def rerounded(self, codes: torch.Tensor, widening: torch.Tensor) -> CodebookWeight:
        """Other codes (rows, cols) into the same values, each row's times its widening (rows,)."""
        return CodebookWeight(codes, self.values * widening[:, None, None])


def nearest(weight: torch.Tensor, values: torch.Tensor) -> CodebookWeight:
    """Every weight (rows, cols) as the nearest of its row's values (rows, n), in any order; ties go to the larger."""
    ordered, order = values.sort(dim=1)
    middles = ((ordered[:, 1:] + ordered[:, :-1]) / 2).contiguous()
    place = torch.searchsorted(middles, weight.contiguous(), right=True)
    return CodebookWeight(order.gather(1, place).to(torch.uint8), values[:, None].float())


def weighted_error(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Σ_j h_j (w_j - ŵ_j)² float64 (rows,); moment h (cols,) or (rows, cols)."""
    return ((rounded - weight).double().square() * moment.double()).sum(1)
