"""Fit the transform of a treatment to one input."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graphs.ops import hadamard
from lrq_export.comparison.inputs import LayerInput
from lrq_export.comparison.treatments import Transforming, Treatment
from lrq_export.quant.methods import METHODS
from lrq_export.quant.rotation import Rotation
from lrq_export.quant.transforms.balance import fit_balance
from lrq_export.quant.transforms.base import Chain, Identity, Transform
from lrq_export.quant.transforms.dual import fit_dual
from lrq_export.quant.transforms.equalize import equalizer
from lrq_export.quant.transforms.smooth import fit_smooth
from lrq_export.rotations import Candidate, choose, hadamard_candidates

ARS_THRESHOLD = 1.0  # of J: below it a Hadamard rotation, from it on the dual transform (LRQ-DiT)


@dataclass
class Fitted:
    """The inputs of a model and the transforms that were fitted to them, each once for all methods that share it."""

    inputs: list[LayerInput]
    seed: int = 0  # of what transforms draw: signs, and the dual transform's rotations
    _known: dict[tuple, tuple[Transform, str]] = field(default_factory=dict)

    def transform(self, source: LayerInput, treatment: Treatment, bits: int, act_bits: int) -> tuple[Transform, str]:
        """The transform and why it is this one."""
        if treatment.transform in ("auto", "auto_unequalized", "auto_dual"):
            key = source.layers[0], treatment.transform, bits, act_bits
            if key not in self._known:
                self._known[key] = _auto(source, bits, act_bits, self._candidates(source, treatment.transform))
            return self._known[key]
        return self._once(source, treatment.smoothed, treatment.transform)

    def _candidates(self, source: LayerInput, kind: Transforming) -> list[Candidate]:
        divisors = None if kind == "auto_unequalized" else equalizer(source.correlation.diagonal(), source.weights)
        candidates = hadamard_candidates(source.width, source.head_width, self.seed, divisors)
        if kind == "auto_dual":
            candidates.append(Candidate("dual transform", self._once(source, False, "dual")[0]))
        return candidates

    def _once(self, source: LayerInput, smoothed: bool, kind: Transforming) -> tuple[Transform, str]:
        key = source.layers[0], smoothed, kind
        if key not in self._known:
            self._known[key] = _fit(source, kind, smoothed, self.seed)
        return self._known[key]


def _fit(source: LayerInput, kind: Transforming, smoothed: bool, seed: int) -> tuple[Transform, str]:
    if not smoothed:
        return _fit_to(source.tokens, source, kind, seed)
    smooth = fit_smooth(source.absmax_by_timestep.amax(0), source.weights)
    transform, reason = _fit_to(smooth.apply(source.tokens), source, kind, seed)
    return Chain((smooth, transform)), f"smoothed, {reason}"


def _fit_to(tokens: torch.Tensor, source: LayerInput, kind: Transforming, seed: int) -> tuple[Transform, str]:
    """The transform of tokens, smoothed or not; J of `ars` stays that of the input itself."""
    width = source.width
    if kind == "none":
        return Identity(width), "none"
    if kind == "hadamard":
        return _full(width, None), "full Hadamard"
    if kind == "signed_hadamard":
        return _full(width, seed), "full Hadamard with signs"
    if kind == "dual":
        return fit_dual(tokens, seed=seed), "dual transform"
    if kind == "balance":
        return fit_balance(source.absmax_by_timestep, source.weights), "balanced channels"
    assert kind == "ars", kind
    if source.rms < ARS_THRESHOLD:
        return _full(width, seed), f"J = {source.rms:.2f} < {ARS_THRESHOLD:g}: full Hadamard with signs"
    return fit_dual(tokens, seed=seed), f"J = {source.rms:.2f}: dual transform"


def _full(width: int, seed: int | None) -> Transform:
    """The largest Hadamard rotation that the width allows."""
    return Rotation(width, hadamard.blocks(width)[-1], seed)


def _auto(source: LayerInput, bits: int, act_bits: int, candidates: list[Candidate]) -> tuple[Transform, str]:
    # On twin-log whatever the quantizer: what is compared then are quantizers, not rotations.
    def quantize(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        return METHODS["tlq"].quantize(weight, moment, bits=bits).dequantize()

    choice = choose(source.weights, source.tokens, source.correlation, candidates, act_bits, quantize)
    return choice.chosen.transform, choice.reason
