"""A linear layer on quantized weights: what the deployed graph computes, in torch."""

from __future__ import annotations

import torch
from torch import nn

from graphs import names
from lrq_export.errors import UsageError
from lrq_export.quant.activation import largest_integer, quantize_tokens
from lrq_export.quant.rotation import PartialRotation, Rotation
from lrq_export.quant.weight import QuantizedWeight

EXACT = 2**24  # float32 holds every integer up to here
RANGE_STEP = 64  # columns: where a product may be cut


class QuantizedLinear(nn.Module):
    """y = ((x_int @ W_int^T) * s_token) * scale + bias, the integer sums exact, everything else in float32.

    The INT32 accumulation of the deployed kernels is reproduced by float32 products over column ranges. Within a range
    no partial sum can leave +-2^24 (the largest row sum of |W_int| times the largest activation), so any order of
    summation is exact; the ranges are added in int32. torch._int_mm is exact too, but tens of times slower on CPUs
    without VNNI; a float64 product costs twice as much (`tools/bench_search.py`). The weight is fixed once built.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        act_bits: int = 8,
        rotation: Rotation | PartialRotation | None = None,
    ):
        super().__init__()
        integers = weight.integer_weight()
        rows, cols = integers.shape
        if rotation is not None and rotation.width != cols:
            raise UsageError(f"rotation: got width {rotation.width}, needed the layer's {cols} input channels")
        if bias is not None and bias.shape != (rows,):
            raise UsageError(f"bias: got shape {tuple(bias.shape)}, needed ({rows},)")
        self.out_features, self.in_features = rows, cols
        self.act_bits, self.rotation = act_bits, rotation
        self.register_buffer("weight", integers)
        self.register_buffer("scale", weight.scale.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._ranges = [] if act_bits == names.FLOATING_POINT else exact_ranges(integers, largest_integer(act_bits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) of any floating type -> (..., out_features) of the same type."""
        y = self.rotation.apply(x.float()) if self.rotation is not None else x.float()
        if self.act_bits == names.FLOATING_POINT:
            y = y @ (self.weight.float() * self.scale[:, None]).T
        else:
            q, s = quantize_tokens(y, self.act_bits)
            y = (self._integer_product(q).float() * s) * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, act_bits={self.act_bits}, rotation={self.rotation}"

    def _integer_product(self, q: torch.Tensor) -> torch.Tensor:
        """q (..., in_features) @ weight^T: exact, float32 if one range holds it, int32 otherwise."""
        if len(self._ranges) == 1:
            return q @ self.weight.float().T
        return sum((q[..., cols] @ self.weight[:, cols].float().T).int() for cols in self._ranges)


def exact_ranges(integers: torch.Tensor, largest_activation: int) -> list[slice]:
    """Split the columns of W_int (rows, cols) so that no partial sum of a range can exceed 2^24 in magnitude."""
    limit = EXACT // largest_activation
    ranges, start, bound = [], 0, torch.zeros(len(integers), dtype=torch.int64)
    for position, part in enumerate(integers.split(RANGE_STEP, dim=1)):
        added = part.short().abs().sum(1)  # at most 64 * 127, and 64 * 127 * 127 < 2^24: one part always fits
        if (bound + added).max() > limit:
            ranges.append(slice(start, position * RANGE_STEP))
            start, bound = position * RANGE_STEP, torch.zeros_like(bound)
        bound += added
    return [*ranges, slice(start, integers.shape[1])]
