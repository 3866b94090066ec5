"""DuQuant's dual transform (Lin et al. 2024, arXiv 2406.01721): rotate blocks, deal channels out, rotate blocks again.

T = R1 P R2. R1 and R2 are block-diagonal with one rotation for all blocks, found greedily: every step spreads the
channel with the largest value over its block, and the steps up to the smallest peak are kept. P deals the channels,
sorted by peak, to the blocks in boustrophedon order, so that every block gets as many large ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import torch

from lrq_export.errors import InputError, UsageError
from lrq_export.quant.transforms.base import FLOAT_BITS, in_working_type

LARGEST_BLOCK = 128


@dataclass(frozen=True, eq=False)
class DualTransform:
    """T = R1 P R2, orthogonal: weights take the same map as activations."""

    first: torch.Tensor  # R1 of every block, float64 (block, block)
    permutation: torch.Tensor  # int64 (width,): channel i of x P is channel permutation[i] of x
    second: torch.Tensor  # R2 of every block, float64 (block, block)

    @property
    def width(self) -> int:
        return len(self.permutation)

    @property
    def block(self) -> int:
        return len(self.first)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        x = in_working_type(x, self.width)
        return _rotate(_rotate(x, self.first)[..., self.permutation], self.second)

    def apply_to_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self.apply(weight)

    def parameters(self) -> int:
        return FLOAT_BITS * (2 * self.block**2 + self.width)

    @property
    def flops_per_token(self) -> int:
        return 2 * 2 * self.block * self.width  # two rotations, a multiplication and an addition an entry


@dataclass(frozen=True)
class _Search:
    """What a greedy step looks at, and what it turns by."""

    # Of stacked blocks (rows, block): the peak to make small, and the index of the channel to spread.
    outlier: Callable[[torch.Tensor], tuple[float, int]]
    # From the flat base (block, block) and a random orthogonal Q = diag(1, Q'): the rotation that spreads channel 0.
    spread: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fit_dual(
    tokens: torch.Tensor, block: int | None = None, steps: int = 256, seed: int = 0, *, as_released: bool = False
) -> DualTransform:
    """Fit both rotations, at most `steps` steps each, and the permutation to tokens (n, width), smoothed if x will be.

    A few hundred tokens do. The search runs in their type (float32 is twice as fast), the rotations are float64.
    `block` None is the largest divisor of the width up to 128. `as_released` searches as DuQuant's code does, which
    differs from the paper: it swaps by the *row* of the extremum, keeps the first column of the flat-rowed matrix
    but not its flat row, and measures the peak as max - min. Either is exact.
    Raises UsageError for a wrong shape or block, InputError for a token that is not finite.
    """
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise UsageError(f"dual transform: got tokens of shape {tuple(tokens.shape)}, needed (n, width)")
    width = tokens.shape[1]
    block = largest_block(width) if block is None else block
    if block < 1 or width % block:
        hint = f"set block to {largest_block(width)}"
        raise UsageError(f"dual transform: got block {block}, needed a divisor of {width} channels", hint=hint)
    tokens = in_working_type(tokens.detach(), width)
    if not torch.isfinite(tokens).all():
        raise InputError("dual transform: got tokens with NaN or infinities, needed finite ones")
    search, generator = _RELEASED if as_released else _PAPER, torch.Generator().manual_seed(seed)
    first = _greedy_rotation(tokens.reshape(-1, block), steps, generator, search)
    turned = _rotate(tokens, first)
    permutation = boustrophedon(turned.abs().amax(0), width // block)
    second = _greedy_rotation(turned[:, permutation].reshape(-1, block), steps, generator, search)
    return DualTransform(first, permutation, second)


def largest_block(width: int) -> int:
    """The largest divisor of the width up to 128."""
    return max(size for size in range(1, min(width, LARGEST_BLOCK) + 1) if width % size == 0)


def boustrophedon(peaks: torch.Tensor, blocks: int) -> torch.Tensor:
    """Channels sorted by peak (width,), the largest first, dealt to the blocks 0 .. K-1, K-1 .. 0, 0 .. K-1, ...

    Returns int64 (width,): the channels of block 0 from the largest on, then those of block 1, and so on.
    """
    dealt = peaks.argsort(descending=True, stable=True).reshape(-1, blocks)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.reshape(-1)


def _greedy_rotation(y: torch.Tensor, steps: int, generator: torch.Generator, search: _Search) -> torch.Tensor:
    """R = R^1 ... R^k float64 (block, block), k of 0..steps with the least peak of y R, for stacked blocks y."""
    block = y.shape[1]
    rotation = best = torch.eye(block, dtype=torch.float64)
    least, index = search.outlier(y)
    for _ in range(steps):
        step = _swapped(search.spread(_flat_base(block), _fixing_first(block, generator)), index)
        y, rotation = y @ step.to(y.dtype), rotation @ step
        peak, index = search.outlier(y)
        if peak < least:
            best, least = rotation, peak
    return best


def _largest_column(y: torch.Tensor) -> tuple[float, int]:
    """max |y| and its column d = argmax_j max_i |y_ij|."""
    peak, column = torch.maximum(y.amax(0), -y.amin(0)).max(0)  # aminmax over this axis is ten times slower
    return float(peak), int(column)


def _row_of_extremum(y: torch.Tensor) -> tuple[float, int]:
    """max - min, and the row, modulo the block, of whichever is larger: what the released code swaps with channel 0."""
    low, high = (float(each) for each in torch.aminmax(y))
    position = int(y.argmax() if high >= -low else y.argmin())
    return high - low, position // y.shape[1] % y.shape[1]


# The paper writes R̃ Q, "R̃ a random orthogonal matrix with a uniform first row". Q on the right would undo that row,
# which is what spreads the outlier; Q R̃ with Q = diag(1, Q') is as random and keeps it.
_PAPER = _Search(_largest_column, lambda base, fixing_first: fixing_first @ base)
_RELEASED = _Search(_row_of_extremum, lambda base, fixing_first: base @ fixing_first)


@lru_cache(maxsize=16)
def _flat_base(size: int) -> torch.Tensor:
    """Orthogonal float64 (size, size) whose first row is 1 / sqrt(size) throughout, made of size - 1 plane rotations.

    The last row of the unit matrix goes through planes (i, i + 1) from the last to the first; each leaves 1 / sqrt(n)
    behind and hands the rest on. That row is then swapped with the first.
    """
    base = torch.eye(size, dtype=torch.float64)
    for i in reversed(range(size - 1)):
        cos, sin = 1 / sqrt(i + 2), sqrt((i + 1) / (i + 2))
        plane = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        base[:, i : i + 2] = base[:, i : i + 2] @ plane
    base[[0, -1]] = base[[-1, 0]]
    return base


def _fixing_first(size: int, generator: torch.Generator) -> torch.Tensor:
    """Q = diag(1, Q') float64 (size, size), Q' uniformly random orthogonal (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(size - 1, size - 1, dtype=torch.float64, generator=generator))
    return torch.block_diag(torch.ones(1, 1, dtype=torch.float64), q * r.diagonal().sign())


def _swapped(rotation: torch.Tensor, index: int) -> torch.Tensor:
    """E R E, E swapping channels 0 and `index`."""
    order = torch.arange(len(rotation))
    order[[0, index]] = order[[index, 0]]
    return rotation[order][:, order]


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x times the block-diagonal matrix of one rotation (block, block), in the type of x."""
    return (x.reshape(*x.shape[:-1], -1, len(rotation)) @ rotation.to(x.dtype)).reshape(x.shape)
