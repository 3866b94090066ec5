"""What every quantized weight offers, whichever format holds its bits: W (rows, cols) = scale[row] * integer_weight.

One INT8 product then serves all formats: y = (x_int @ integer_weight^T) * s_token * scale.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from lrq_export.errors import InputError, UsageError

LARGEST = 127  # |integer weight| and |INT8 activation|: symmetric, so that -128 never appears
SMALLEST = 1e-30  # a row that stays below this counts as zero: its scale would leave the normal float32 range


@runtime_checkable
class QuantizedWeight(Protocol):
    """A weight (rows, cols) as INT8 integers and one float32 scale a row."""

    @property
    def scale(self) -> torch.Tensor:
        """float32 (rows,), finite and positive."""

    def integer_weight(self) -> torch.Tensor:
        """int8 (rows, cols) in -127..127."""


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """W float32 (rows, cols) = scale[row] * integer_weight."""
    return weight.integer_weight().float() * weight.scale[:, None]


def checked_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight as contiguous float32 (rows, cols); InputError if a value is NaN or infinite."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise UsageError(f"weight: got shape {tuple(weight.shape)}, needed (rows, cols), neither of them 0")
    weight = weight.detach().to(device="cpu", dtype=torch.float32).contiguous()
    finite = torch.isfinite(weight)
    if not finite.all():
        row, col = (~finite).nonzero()[0].tolist()
        raise InputError(
            f"weight[{row}, {col}]: got {weight[row, col].item()}, needed finite values only",
            hint="the checkpoint is damaged or overflowed in float16: export it again",
        )
    return weight


def checked_bits(bits: int) -> int:
    """The bits of a code. Raises UsageError unless a byte holds them, sign included."""
    if not 2 <= bits <= 8:
        raise UsageError(f"weight bits: got {bits}, needed 2 to 8")
    return bits


def checked_group_size(cols: int, group_size: int | None) -> int:
    """The group size, or all columns for None. Raises UsageError for one that does not divide them."""
    if group_size is None:
        return cols
    divisors = [divisor for divisor in range(1, cols + 1) if cols % divisor == 0]
    if group_size not in divisors:
        nearest = min(divisors, key=lambda divisor: abs(divisor - group_size))
        raise UsageError(f"group size: got {group_size}, needed a divisor of the {cols} columns", hint=f"use {nearest}")
    return group_size


def checked_moment(second_moment: torch.Tensor | None, cols: int) -> torch.Tensor:
    """Column importances h float32 (cols,), mean 1, all positive; None and all-zero moments mean equal importance.

    A column that calibration never saw active keeps a millionth of the mean: its weights still round sensibly.
    """
    if second_moment is None:
        return torch.ones(cols)
    moment = second_moment.detach().to(device="cpu", dtype=torch.float64)
    if moment.shape != (cols,):
        raise UsageError(f"second moment: got shape {tuple(moment.shape)}, needed ({cols},), one value a column")
    if not torch.isfinite(moment).all() or (moment < 0).any():
        raise InputError(
            "second moment: got a negative or non-finite value, needed the mean of x^2 of each column",
            hint="repeat the calibration with finite inputs",
        )
    mean = moment.mean()
    return torch.ones(cols) if mean == 0 else (moment / mean + 1e-6).float()
