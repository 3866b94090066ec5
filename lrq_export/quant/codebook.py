"""A free codebook: 2^b INT8 values for every (row, group), fitted by Lloyd's algorithm to the weighted error.

The bound of what any b-bit table with this granularity can do, and deployable: the product stays INT8, with one scale a
row. Lloyd (1982) finds a local optimum, so it starts twice: from the twin-log levels, which it then never falls behind
but for the rounding of the table, and from evenly filled quantiles. The better end is kept for every group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lrq_export.errors import UsageError
from lrq_export.quant import twin_log
from lrq_export.quant.codebook_weight import CodebookWeight, nearest, weighted_error
from lrq_export.quant.weight import LARGEST, SMALLEST, checked_group_size, checked_moment, checked_weight

STEPS = 25  # of Lloyd's algorithm; the error falls by less than a thousandth after that


@dataclass(frozen=True)
class TableWeight:
    """A weight (rows, cols) in 2^bits INT8 values for every (row, group)."""

    codes: torch.Tensor  # uint8 (rows, cols)
    table: torch.Tensor  # int8 (rows, groups, 2^bits), ascending
    scale: torch.Tensor  # float32 (rows,)

    def integer_weight(self) -> torch.Tensor:
        """int8 (rows, cols); see `QuantizedWeight`."""
        return CodebookWeight(self.codes, self.table).dequantize()

    def codebooks(self) -> torch.Tensor:
        """The value of every code, float32 (rows, groups, 2^bits)."""
        return self.table.float() * self.scale[:, None, None]

    def rerounded(self, codes: torch.Tensor, widening: torch.Tensor) -> TableWeight:
        """Other codes (rows, cols) in the same tables, each row's scale times its widening (rows,)."""
        return replace(self, codes=codes, scale=self.scale * widening)


def quantize(
    weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int, group_size: int | None = None
) -> TableWeight:
    """Fit 2^bits values to every group of W (rows, cols), columns weighted by second_moment (cols,)."""
    if not 1 <= bits <= 8:
        raise UsageError(f"codebook bits: got {bits}, needed 1 to 8")
    weight = checked_weight(weight)
    rows, cols = weight.shape
    size = checked_group_size(cols, group_size)
    moment = checked_moment(second_moment, cols)
    parts = weight.reshape(-1, size)
    importance = moment.view(-1, size).repeat(rows, 1)
    starts = [_quantiles(parts, bits)]
    if bits in twin_log.BITS:
        levels = twin_log.quantize(weight, moment, bits=bits, group_size=group_size).codebooks()
        starts.append(levels.flatten(0, 1))
    fitted = [lloyd(parts, importance, start) for start in starts]
    errors = [weighted_error(parts, nearest(parts, values).dequantize(), importance) for values in fitted]
    best = torch.stack(errors).argmin(0)
    chosen = torch.stack(fitted)[best, torch.arange(len(parts))].view(rows, -1)
    scale = chosen.abs().amax(1) / LARGEST
    scale = torch.where(scale * LARGEST < SMALLEST, torch.ones_like(scale), scale)
    table = torch.round(chosen / scale[:, None]).view(rows, cols // size, -1)
    values = (table * scale[:, None, None]).view(len(parts), -1)
    return TableWeight(nearest(parts, values).codes.view(rows, cols), table.to(torch.int8), scale)


def lloyd(weight: torch.Tensor, importance: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values (rows, n), ascending, of less or equal weighted error; weight and importance are (rows, cols).

    A value that no weight is nearest to stays where it is.
    """
    values = values.sort(dim=1).values
    for _ in range(STEPS):
        codes = nearest(weight, values).codes.long()
        mass = torch.zeros(values.shape, dtype=torch.float64).scatter_add_(1, codes, importance.double())
        total = torch.zeros_like(mass).scatter_add_(1, codes, (importance * weight).double())
        values = torch.where(mass > 0, total / mass, values.double()).float().sort(dim=1).values
    return values


def _quantiles(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The middles of 2^bits equally filled parts of each row."""
    cols, count = weight.shape[1], 2**bits
    places = ((torch.arange(count) + 0.5) / count * cols).long()
    return weight.sort(dim=1).values[:, places]
