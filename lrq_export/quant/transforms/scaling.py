"""One factor a channel: x / d and W d, which moves the spread of channels from activations to weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrq_export.errors import InputError, UsageError
from lrq_export.quant.transforms.base import FLOAT_BITS, in_working_type


@dataclass(frozen=True, eq=False)
class ChannelScaling:
    """T = diag(1 / d). Raises InputError unless every d is positive and finite.

    Where what makes x can be scaled instead (`balance.fold_into_adaln`, `fold_into_linear`), neither the factors nor
    the divisions remain.
    """

    divisor: torch.Tensor  # float32 (width,)

    def __post_init__(self) -> None:
        if self.divisor.ndim != 1 or self.divisor.dtype != torch.float32:
            got = f"{self.divisor.dtype} {tuple(self.divisor.shape)}"
            raise UsageError(f"channel scaling: got {got}, needed float32 (width,)")
        if not torch.isfinite(self.divisor).all() or self.divisor.min() <= 0:
            raise InputError(
                f"channel scaling: got factors from {self.divisor.min():g} to {self.divisor.max():g}, "
                "needed positive and finite ones",
                hint="check the inputs and weights they were made from for NaN and infinities",
            )

    @property
    def width(self) -> int:
        return len(self.divisor)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        x = in_working_type(x, self.width)
        return x / self.divisor.to(x.dtype)

    def apply_to_weight(self, weight: torch.Tensor) -> torch.Tensor:
        weight = in_working_type(weight, self.width)
        return weight * self.divisor.to(weight.dtype)

    def parameters(self) -> int:
        return FLOAT_BITS * self.width

    @property
    def flops_per_token(self) -> int:
        return self.width
