"""Choose how a layer's input is rotated: each candidate is tried on calibration tokens, the least output error wins.

The error is that of the whole layer, ‖X Wᵀ - Q(X R) Q(W R)ᵀ‖², activations and weights quantized as the recipe says. A
rotation that has to be computed while the model runs must earn its work: its error counts times 1 + (work of the
rotation / work of the layers that read it). The dual transform of DuQuant was tried too and is not among the candidates
of a build; docs/methods.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from graphs import names
from graphs.ops import hadamard
from lrq_export.quant.activation import quantize_tokens
from lrq_export.quant.rotation import Rotation
from lrq_export.quant.transforms.base import Identity, Transform

ROWS = 256  # of the weights that are tried; more change no choice
BLOCK = 128  # channels of the block rotation, or the nearest below that divides the width
QuantizeWeight = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (W, E[x²]) to Ŵ, both (rows, cols)


@dataclass(frozen=True)
class Candidate:
    """A transform by the name that reports give it; `online` unless it folds into the layer before."""

    name: str
    transform: Transform
    online: bool = True


@dataclass(frozen=True)
class Choice:
    """The candidate that won, and what every candidate would have lost (relative squared output error)."""

    chosen: Candidate
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """One line for the report: the losses, smallest first."""
        ranked = sorted(self.losses.items(), key=lambda loss: loss[1])
        return f"{self.chosen.name}: output error " + ", ".join(f"{loss:.2e} {name}" for name, loss in ranked)


def hadamard_candidates(width: int, head_width: int | None, seed: int) -> list[Candidate]:
    """What a package can deploy: nothing, Hadamard by head (which folds), by block, full, and full with signs."""
    found = [Candidate("none", Identity(width), online=False)]
    if head_width is not None and width % head_width == 0 and hadamard.supported(head_width):
        found.append(Candidate("head Hadamard", Rotation(width, head_width), online=False))
    blocks = [d for d in range(2, width + 1) if width % d == 0 and hadamard.supported(d)]
    small = [block for block in blocks if block <= BLOCK]
    if small:
        found.append(Candidate("block Hadamard", Rotation(width, small[-1])))
    if blocks and blocks[-1] != (small[-1] if small else 0):
        found.append(Candidate("full Hadamard", Rotation(width, blocks[-1])))
    if blocks:
        found.append(Candidate("signed Hadamard", Rotation(width, blocks[-1], seed)))
    return found


def choose(
    weights: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    candidates: Sequence[Candidate],
    act_bits: int,
    quantize: QuantizeWeight,
) -> Choice:
    """The best candidate for `tokens` (n, cols) that all of `weights`, each (rows, cols), multiply."""
    stacked = torch.cat([weight.float() for weight in weights])
    work = 2 * stacked.numel()
    sampled = stacked[torch.linspace(0, len(stacked) - 1, min(ROWS, len(stacked))).long()]
    exact = tokens @ sampled.T
    power = float(exact.square().sum())
    losses, scores = {}, []
    for candidate in candidates:
        x, weight = candidate.transform.apply(tokens), candidate.transform.apply_to_weight(sampled)
        rounded = quantize(weight, x.double().square().mean(0))
        error = float((_quantized(x, act_bits) @ rounded.T - exact).square().sum())
        losses[candidate.name] = error / power if power else 0.0
        share = candidate.transform.flops_per_token / work if candidate.online else 0.0
        scores.append(losses[candidate.name] * (1 + share))
    return Choice(candidates[scores.index(min(scores))], losses)


def _quantized(x: torch.Tensor, act_bits: int) -> torch.Tensor:
    if act_bits == names.FLOATING_POINT:
        return x
    q, s = quantize_tokens(x, act_bits)
    return q * s
