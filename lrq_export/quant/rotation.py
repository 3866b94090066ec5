"""Hadamard rotations of the input side of a linear layer: X W^T = (X R) (W R)^T, and X R has no outlier channels.

R = diag(signs) H on every contiguous block of channels, H = (H_K (x) H_2^m) / sqrt(block), as the `HadamardRotate` op
defines it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from graphs.ops.hadamard import blocks, dense, factorize, split, supported
from lrq_export.errors import UsageError


def hadamard_signs(width: int, seed: int) -> torch.Tensor:
    """Reproducible signs +-1, float32 (width,): the bits of SHAKE-256 of the seed, so no library version matters."""
    return _signs(width, seed).clone()


@lru_cache(maxsize=64)
def _signs(width: int, seed: int | None) -> torch.Tensor:
    if seed is None:
        return torch.ones(width)
    stream = hashlib.shake_256(f"lrq-export hadamard signs {seed}".encode()).digest(-(-width // 8))
    bits = [byte >> place & 1 for byte in stream for place in range(8)]
    return 1 - 2 * torch.tensor(bits[:width], dtype=torch.float32)


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map on `width` channels. `seed` None leaves the signs at +1."""

    width: int
    block: int
    seed: int | None = None
    kind: Literal["hadamard"] = "hadamard"

    def __post_init__(self) -> None:
        if self.kind != "hadamard":
            raise UsageError(f"rotation kind: got {self.kind!r}, needed 'hadamard'")
        if self.block < 1 or self.width < 1 or self.width % self.block or not supported(self.block):
            raise UsageError(
                f"rotation block: got {self.block}, needed a divisor of {self.width} channels with a Hadamard matrix",
                hint=_nearest_blocks(self.width, self.block),
            )

    @property
    def signs(self) -> torch.Tensor:
        """float32 (width,) of +-1."""
        return _signs(self.width, self.seed).clone()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x R over the last axis; computed in float64 if x is, otherwise in float32; same type as x.

        Activations and weights take the same map: W (rows, width) becomes W R.
        """
        return _transform(self._checked(x) * _signs(self.width, self.seed), self.block, inverse=False).to(x.dtype)

    def apply_inverse(self, x: torch.Tensor) -> torch.Tensor:
        """x R^T over the last axis: undoes `apply`."""
        return (_transform(self._checked(x), self.block, inverse=True) * _signs(self.width, self.seed)).to(x.dtype)

    def apply_to_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W R, of W (rows, width)."""
        return self.apply(weight)

    def parameters(self) -> int:
        """Bits of side data: none, the signs come from the seed."""
        return 0

    @property
    def flops_per_token(self) -> int:
        """A multiplication and an addition per entry of both factors of H."""
        return 2 * self.width * sum(len(factor) for factor in _matrices(self.block, torch.float32) if len(factor) > 1)

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """x in the type of the computation; UsageError if its last axis is not `width` long."""
        if x.shape[-1] != self.width:
            raise UsageError(f"rotation: got {x.shape[-1]} channels, needed {self.width}")
        return x if x.dtype == torch.float64 else x.float()


def _transform(x: torch.Tensor, block: int, *, inverse: bool) -> torch.Tensor:
    """x H (x H^T if inverse) per block, as two products with factors of H, neither over 256 wide."""
    left, right = _matrices(block, x.dtype)
    if inverse:
        left, right = left.T, right.T
    y = x.reshape(-1, len(right)) @ right
    y = left.T @ y.reshape(-1, len(left), len(right))
    return (y * block**-0.5).reshape(x.shape)


@lru_cache(maxsize=32)
def _matrices(block: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = (dense(factors) for factors in split(factorize(block)))
    return torch.tensor(left, dtype=dtype), torch.tensor(right, dtype=dtype)


def _nearest_blocks(width: int, block: int) -> str:
    """Advice: the usable block below and the one above what was asked for."""
    usable = blocks(width)[1:]
    below, above = [size for size in usable if size <= block], [size for size in usable if size > block]
    nearest = below[-1:] + above[:1]
    if not nearest:
        return "no block divides this width: do not rotate this layer"
    return "set block to " + " or ".join(map(str, nearest))
