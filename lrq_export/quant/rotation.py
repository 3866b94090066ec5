"""Hadamard rotations of the input side of a linear layer: X W^T = (X R) (W R^-T)^T, and X R has no outlier channels.

R = diag(signs / d) H on every contiguous block of channels, H = (H_K (x) H_2^m) / sqrt(block), as the `HadamardRotate`
op defines it. The divisors d are 1, and R^-T = R, but where channels are equalized (`quant.transforms.equalize`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from graphs.equalizer import divisors
from graphs.ops.hadamard import blocks, dense, factorize, split, supported
from lrq_export.errors import UsageError

EQUALIZER_BITS = 32  # of a divisor: packages hold a float32 for each channel


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


@lru_cache(maxsize=64)
def _divisors(width: int, equalizer: str | None) -> torch.Tensor:
    """d float64 (width,)."""
    return torch.ones(width, dtype=torch.float64) if equalizer is None else torch.from_numpy(divisors(equalizer))


@dataclass(frozen=True)
class Rotation:
    """R on `width` channels. `seed` None leaves the signs at +1; `equalizer` is d as `graphs.equalizer` writes it.

    Raises UsageError for a block without a Hadamard matrix or of another width, and for another number of divisors.
    """

    width: int
    block: int
    seed: int | None = None
    equalizer: str | None = None

    def __post_init__(self) -> None:
        if self.equalizer is not None and len(_divisors(self.width, self.equalizer)) != self.width:
            found = len(divisors(self.equalizer))
            raise UsageError(f"rotation: got {found} divisors, needed one for each of {self.width} channels")
        if self.block < 1 or self.width < 1 or self.width % self.block or not supported(self.block):
            raise UsageError(
                f"rotation block: got {self.block}, needed a divisor of {self.width} channels with a Hadamard matrix",
                hint=_nearest_blocks(self.width, self.block),
            )

    @property
    def signs(self) -> torch.Tensor:
        """float32 (width,) of +-1."""
        return _signs(self.width, self.seed).clone()

    @property
    def factors(self) -> torch.Tensor:
        """signs / d float64 (width,): what `HadamardRotate` gets as its signs."""
        return self.signs / self._divisors

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x R over the last axis; computed in float64 if x is, otherwise in float32; same type as x."""
        x, dtype = self._checked(x), x.dtype
        return _transform(x * self.factors.to(x.dtype), self.block, inverse=False).to(dtype)

    def apply_inverse(self, x: torch.Tensor) -> torch.Tensor:
        """x R^-1 over the last axis: undoes `apply`."""
        x, dtype = self._checked(x), x.dtype
        return (_transform(x, self.block, inverse=True) * self._weight_factors(x.dtype)).to(dtype)

    def apply_to_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W R^-T, of W (rows, width)."""
        x, dtype = self._checked(weight), weight.dtype
        return _transform(x * self._weight_factors(x.dtype), self.block, inverse=False).to(dtype)

    def parameters(self) -> int:
        """Bits of side data: the divisors; signs come from the seed."""
        return 0 if self.equalizer is None else EQUALIZER_BITS * self.width

    @property
    def flops_per_token(self) -> int:
        """A multiplication and an addition per entry of both factors of H, and what divides the channels."""
        entries = sum(len(factor) for factor in _matrices(self.block, torch.float32) if len(factor) > 1)
        return self.width * (2 * entries + (self.equalizer is not None))

    @property
    def _divisors(self) -> torch.Tensor:
        return _divisors(self.width, self.equalizer)

    def _weight_factors(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.signs * self._divisors).to(dtype)

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """x in the type of the computation; UsageError if its last axis is not `width` long."""
        if x.shape[-1] != self.width:
            raise UsageError(f"rotation: got {x.shape[-1]} channels, needed {self.width}")
        return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class PartialRotation:
    """`rotation` of its width of channels from `start` on; the others of `width` channels stay as they are."""

    width: int
    start: int
    rotation: Rotation

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., width), rotated in part; same type as x."""
        return self._on_part(x, self.rotation.apply)

    def apply_inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Undoes `apply`."""
        return self._on_part(x, self.rotation.apply_inverse)

    def _on_part(self, x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        stop = self.start + self.rotation.width
        part = change(x[..., self.start : stop]).to(x.dtype)
        return torch.cat([x[..., : self.start], part, x[..., stop:]], dim=-1)


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
