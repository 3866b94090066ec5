"""What every exact transform offers, the transform that does nothing, and transforms one after another.

`quant.rotation.Rotation`, the Hadamard rotation, is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from lrq_export.errors import UsageError

FLOAT_BITS = 16  # of a stored factor, a matrix entry or an index, as for the numbers of `quant.methods`


@runtime_checkable
class Transform(Protocol):
    """An invertible T (width, width). Both maps compute in float64 where they get it, otherwise in float32."""

    @property
    def width(self) -> int:
        """Channels of x, columns of W."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x T over the last axis of x (..., width), same shape. UsageError for another width."""

    def apply_to_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W T^-T of W (rows, width), same shape, so that x T (W T^-T)^T = x W^T. UsageError for another width."""

    def parameters(self) -> int:
        """Bits of side data to store beside the weight, before anything is folded into neighbouring layers."""

    @property
    def flops_per_token(self) -> int:
        """Multiplications and additions that `apply` costs one token at run time, before any folding."""


@dataclass(frozen=True)
class Identity:
    """T = I."""

    width: int

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return in_working_type(x, self.width)

    def apply_to_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return in_working_type(weight, self.width)

    def parameters(self) -> int:
        return 0

    @property
    def flops_per_token(self) -> int:
        return 0


@dataclass(frozen=True)
class Chain:
    """T = T_1 T_2 ..., `parts` from left to right. Raises UsageError for no parts, or parts of different widths."""

    parts: tuple[Transform, ...]

    def __post_init__(self) -> None:
        widths = [part.width for part in self.parts]
        if len(set(widths)) != 1:
            raise UsageError(f"chain of transforms: got widths {widths}, needed at least one part and one width")

    @property
    def width(self) -> int:
        return self.parts[0].width

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part.apply(x)
        return x

    def apply_to_weight(self, weight: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            weight = part.apply_to_weight(weight)
        return weight

    def parameters(self) -> int:
        return sum(part.parameters() for part in self.parts)

    @property
    def flops_per_token(self) -> int:
        return sum(part.flops_per_token for part in self.parts)


def in_basis(second_moments: torch.Tensor, transform: Transform) -> torch.Tensor:
    """E[(x T)ᵀ (x T)] = Tᵀ E[xᵀ x] T (width, width), float64 if E[xᵀ x] is, otherwise float32."""
    return transform.apply(transform.apply(second_moments).T.contiguous()).T.contiguous()


def in_working_type(x: torch.Tensor, width: int) -> torch.Tensor:
    """x as float64 if it is that, otherwise as float32. Raises UsageError if its last axis is not `width` long."""
    if x.shape[-1:] != (width,):
        raise UsageError(f"transform: got shape {tuple(x.shape)}, needed {width} channels on the last axis")
    return x if x.dtype == torch.float64 else x.float()
