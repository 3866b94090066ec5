"""How the inputs of a simulated layer are quantized: each callable maps x (samples, ..., cols) to its rounded form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lrq_export.quant.activation import largest_integer, rounded_tokens

SHRINKS = tuple((torch.arange(20, 101, 2) / 100).tolist())  # parts of the largest magnitude that static scales try
RANGES = 4  # of timesteps with a scale of their own


@dataclass
class Clock:
    """The timestep at which the model is being run; simulated layers share one."""

    timestep: float = 0.0


@dataclass(frozen=True)
class PerToken:
    """Symmetric, scaled by each token's largest magnitude, as deployed."""

    bits: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rounded_tokens(x, self.bits)


@dataclass(frozen=True)
class PerTokenGroup:
    """Asymmetric over the range of each token's group of channels (Q-DiT, arXiv 2406.17343)."""

    bits: int
    group: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(-1, (-1, self.group))
        low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
        step = (high - low) / (2**self.bits - 1)
        # A group of one value x takes the step |x|: it is then on the grid.
        step = torch.where(step > 0, step, torch.where(low == 0, torch.ones_like(low), low.abs()))
        zero = torch.round(-low / step)
        q = (torch.round(parts / step) + zero).clamp_(0, 2**self.bits - 1)
        return ((q - zero) * step).flatten(-2)


@dataclass(frozen=True)
class Static:
    """Symmetric with one scale of the whole tensor for each range of timesteps; one range is the plain static scale."""

    bits: int
    edges: tuple[float, ...]  # ascending lower ends of all ranges but the first
    scales: tuple[float, ...]
    clock: Clock

    @classmethod
    def fit(cls, tokens: torch.Tensor, timesteps: torch.Tensor, bits: int, ranges: int, clock: Clock) -> Static:
        """Scales of least squared error on tokens (n, cols) with timesteps (n,), ranges equally filled."""
        order = timesteps.argsort(stable=True)
        parts = [part for part in order.chunk(ranges) if len(part)]
        edges = tuple(float(timesteps[part].min()) for part in parts[1:])
        return cls(bits, edges, tuple(_best_scale(tokens[part], bits) for part in parts), clock)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scales[sum(self.clock.timestep >= edge for edge in self.edges)]
        return _rounded(x, scale, self.bits)


def _best_scale(tokens: torch.Tensor, bits: int) -> float:
    unclipped = float(tokens.abs().max()) / largest_integer(bits) or 1.0
    scales: Sequence[float] = [unclipped * shrink for shrink in SHRINKS]
    errors = [float((_rounded(tokens, scale, bits) - tokens).square().sum()) for scale in scales]
    return scales[errors.index(min(errors))]


def _rounded(x: torch.Tensor, scale: float, bits: int) -> torch.Tensor:
    top = largest_integer(bits)
    return torch.round(x / scale).clamp_(-top, top) * scale
