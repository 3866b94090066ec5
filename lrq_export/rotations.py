"""Choose how a layer's input is rotated: each candidate is tried on calibration tokens, the least output error wins.

The error is that of the layer's output, of rounded activations and of rounded weights, each with the other exact. A
rotation that has to be computed while the model runs must earn its work: its error counts times 1 + (work of the
rotation / work of the layers that read it).

The dual transform of DuQuant is not among the candidates of a build: no op of the dialect computes it, and where
`lrq-export compare --methods tlq_auto_dual` tried it, it was never the best (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from graphs import names
from graphs.ops import hadamard
from lrq_export.calibrate.observed import Observed
from lrq_export.evaluate import ReadTensor
from lrq_export.plan import LayerPlan
from lrq_export.quant import uniform
from lrq_export.quant.activation import rounded_tokens
from lrq_export.quant.compensate import conditional_variances
from lrq_export.quant.formats import QUANTIZERS
from lrq_export.quant.rotation import Rotation
from lrq_export.quant.transforms.base import Identity, Transform, in_basis
from lrq_export.quant.transforms.equalize import equalizer
from lrq_export.quant.weight import dequantize

ROWS = 128  # of the weights that are tried; more change no choice
BLOCK = 128  # channels of the block rotation, or the nearest below that divides the width
SHARED = "head Hadamard, as all that share an attention"
QuantizeWeight = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (W, importance (cols,)) to Ŵ (rows, cols)


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


def shared_candidate(width: int, head_width: int) -> Candidate:
    """What layers get that share an attention's output (`ModelFamily.shares_attention`)."""
    return Candidate(SHARED, Rotation(width, max(hadamard.blocks(head_width))), online=False)


def hadamard_candidates(width: int, head_width: int | None, seed: int, divisors: str | None = None) -> list[Candidate]:
    """What a package can deploy: nothing, Hadamard by block, full, and full with signs.

    With a `head_width`, which an attention's output has, only what folds into the value projection: Hadamard by head,
    with and without signs. With `divisors` (`graphs.equalizer`), also each with its channels equalized first, and
    equalizing alone.
    """
    folds = head_width is not None
    found = [Candidate("none", Identity(width), online=False), *_rotations(width, head_width, seed, None)]
    if divisors is not None:
        found.append(Candidate("equalized", Rotation(width, 1, None, divisors), online=not folds))
        equalized = _rotations(width, head_width, seed, divisors)
        found += [replace(each, name=f"equalized {each.name}") for each in equalized]
    return found


def _rotations(width: int, head_width: int | None, seed: int, divisors: str | None) -> list[Candidate]:
    if head_width is not None:
        block = max(hadamard.blocks(head_width), default=1)
        if block == 1 or width % head_width:
            return []
        unsigned, signed = (Rotation(width, block, each, divisors) for each in (None, seed))
        return [Candidate("head Hadamard", unsigned, False), Candidate("signed head Hadamard", signed, False)]
    found = []
    blocks = hadamard.blocks(width)[1:]
    small = [block for block in blocks[:-1] if block <= BLOCK]
    if small:
        found.append(Candidate("block Hadamard", Rotation(width, small[-1], None, divisors)))
    if blocks:
        found.append(Candidate("full Hadamard", Rotation(width, blocks[-1], None, divisors)))
        found.append(Candidate("signed Hadamard", Rotation(width, blocks[-1], seed, divisors)))
    return found


def choose_rotations(
    plans: Sequence[LayerPlan],
    observed: Observed,
    read: ReadTensor,
    head_width: Callable[[str], int | None],
    shares_attention: Callable[[str], bool],
    seed: int,
    done: Callable[[str], None] = lambda layer: None,
) -> list[LayerPlan]:
    """The plans with a rotation for every layer, the same for layers that read one input; `read` gives source weights.

    `head_width` and `shares_attention` are those of `ModelFamily`, `seed` that of signs. `done` is told each layer's
    name, for progress.
    """
    plan_of = {plan.name: plan for plan in plans}
    for layers in observed.siblings():
        first = plan_of[layers[0]]
        weights = [read(f"{layer}.weight") for layer in layers]
        divisors = equalizer(observed.statistics.layer(first.name).second_moment, weights)
        if shares_attention(first.name):
            candidates = [shared_candidate(first.cols, head_width(first.name))]
        else:
            candidates = hadamard_candidates(first.cols, head_width(first.name), seed, divisors)
        quantize = _quantizer(first)
        correlation = observed.correlation(first.name)
        choice = choose(weights, observed.tokens(first.name), correlation, candidates, first.act_bits, quantize)
        for layer in layers:
            plan_of[layer] = replace(plan_of[layer], reason=choice.reason, **_planned(choice.chosen.transform))
            done(layer)
    return [plan_of[plan.name] for plan in plans]


def _planned(transform: Transform) -> dict[str, Any]:
    """The fields of a plan that say how the input is transformed."""
    if isinstance(transform, Identity):
        return {"block": 0, "signs_seed": None, "equalizer": None}
    return {"block": transform.block, "signs_seed": transform.seed, "equalizer": transform.equalizer}


def _quantizer(plan: LayerPlan) -> QuantizeWeight:
    """As the plan will quantize the weight, but for error feedback."""
    if plan.bits == names.INT8_BITS:
        return lambda weight, importance: dequantize(uniform.quantize(weight, importance))
    fit = partial(QUANTIZERS[plan.method], bits=plan.bits, group_size=plan.group_size)
    return lambda weight, importance: dequantize(fit(weight, importance))


def choose(
    weights: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    correlation: torch.Tensor | None,
    candidates: Sequence[Candidate],
    act_bits: int,
    quantize: QuantizeWeight,
) -> Choice:
    """The best candidate for `tokens` (n, cols), of E[x xᵀ] (cols, cols), that all `weights`, each (rows, cols), read.

    With a correlation, rounding errors will be carried forward, and count as what is left of them then.
    """
    stacked = torch.cat([weight.detach().float() for weight in weights])
    work = 2 * stacked.numel()
    sampled = stacked[torch.linspace(0, len(stacked) - 1, min(ROWS, len(stacked))).long()]
    power = float((tokens @ sampled.T).square().sum()) / len(tokens)

    def loss(candidate: Candidate) -> float:
        transform = candidate.transform
        x, weight = transform.apply(tokens), transform.apply_to_weight(sampled)
        importance = _importance(x, correlation, transform)
        lost = float((weight - quantize(weight, importance)).double().square().sum(0) @ importance)
        if act_bits != names.FLOATING_POINT:
            lost += float(((rounded_tokens(x, act_bits) - x) @ weight.T).square().sum()) / len(x)
        return lost / power if power else 0.0

    # Most of it is many small operations, which torch's own threads do not share.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        losses = list(pool.map(loss, candidates))
    scores = [
        lost * (1 + (each.transform.flops_per_token / work if each.online else 0.0))
        for each, lost in zip(candidates, losses, strict=True)
    ]
    best = candidates[scores.index(min(scores))]
    return Choice(best, {each.name: lost for each, lost in zip(candidates, losses, strict=True)})


def _importance(x: torch.Tensor, correlation: torch.Tensor | None, transform: Transform) -> torch.Tensor:
    """What a squared error in a column of the weight costs the output, float64 (cols,)."""
    if correlation is None:
        return x.double().square().mean(0)
    return conditional_variances(in_basis(correlation, transform)).double()
