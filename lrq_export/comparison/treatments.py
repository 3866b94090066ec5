"""The ways to quantize a diffusion transformer that `compare` knows: whole recipes of papers, and ours.

Each is written down as its parts: how weights are rounded, how inputs are transformed and quantized. Where a paper
trains (AdaRound in PTQ4DiT) or tunes by hand (LRQ-DiT's list of layers), the note says what stands in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lrq_export.errors import UsageError
from lrq_export.quant.methods import METHODS
from lrq_export.recipe import nearest

Transforming = Literal[
    "none", "hadamard", "signed_hadamard", "dual", "balance", "ars", "auto", "auto_unequalized", "auto_dual"
]
Activation = Literal["token", "token_group", "tensor", "timestep_range"]
# Of rounding errors over the columns: GPTQ on a codebook fitted beforehand, or ours, which fits the codebook to it.
Carrying = Literal["none", "gptq", "fitted"]

DEPLOYABLE: tuple[Transforming, ...] = ("none", "hadamard", "signed_hadamard", "auto", "auto_unequalized")


@dataclass(frozen=True)
class Treatment:
    """One way to quantize every linear layer."""

    name: str
    title: str
    weights: str  # a name in METHODS
    transform: Transforming
    activations: Activation = "token"
    smoothed: bool = False  # by SmoothQuant's factors, before the transform
    feedback: Carrying = "none"
    bias_correction: bool = False
    group: int | None = None  # columns that share a scale: the largest divisor of a layer's columns up to this
    published: bool = True
    note: str = ""

    @property
    def obstacle(self) -> str | None:
        """Why no package can hold it; None if one can."""
        if self.smoothed or self.transform not in DEPLOYABLE:
            return "packages transform inputs by Hadamard rotations only"
        if self.activations != "token":
            return "packages quantize activations per token"
        return METHODS[self.weights].obstacle


def _ours(weights: str) -> Treatment:
    """The default recipe of `build` on any quantizer."""
    title = "ours: twin-log" if weights == "tlq" else f"ours, on {weights}"
    return Treatment(weights, title, weights, "auto", feedback="fitted", bias_correction=True, published=False)


_PUBLISHED = (
    Treatment("rtn", "round to nearest", "uniform_minmax", "none"),
    Treatment("smoothquant", "SmoothQuant", "uniform_minmax", "none", smoothed=True),
    Treatment(
        "quarot", "QuaRot", "uniform_minmax", "signed_hadamard", feedback="gptq", note="with GPTQ, on min-max grids"
    ),
    Treatment("duquant", "DuQuant", "uniform_clip", "dual", smoothed=True, note="the paper's dual transform"),
    Treatment(
        "q_dit", "Q-DiT", "uniform_minmax", "none", "token_group", feedback="gptq", group=128,
        note="groups of up to 128, not searched; their scales are fixed before GPTQ",
    ),
    Treatment(
        "ptq4dit", "PTQ4DiT", "uniform_clip", "balance", "tensor",
        note="without AdaRound, which trains; every input is balanced, at 16 bits a channel",
    ),
    Treatment(
        "lrq_dit", "LRQ-DiT, as released", "tlq_released", "ars", smoothed=True,
        note="J against 1 decides, where the release lists layers by hand; 2^b codes, columns weighted in the search",
    ),
    Treatment("lrq_dit_text", "LRQ-DiT, as written", "tlq_paper", "ars"),
)  # fmt: skip
_OURS = tuple(_ours(name) for name in METHODS)
_TLQ = _OURS[0]
_ABLATIONS = (
    replace(_TLQ, name="tlq_nearest", title="twin-log, to nearest", feedback="none"),
    replace(_TLQ, name="tlq_gptq", title="twin-log, plain GPTQ", feedback="gptq"),
    replace(_TLQ, name="tlq_not_rotated", title="twin-log, not rotated", transform="none"),
    replace(_TLQ, name="tlq_hadamard", title="twin-log, full Hadamard", transform="hadamard"),
    replace(_TLQ, name="tlq_dual", title="twin-log, dual transform", transform="dual"),
    replace(_TLQ, name="tlq_not_equalized", title="twin-log, not equalized", transform="auto_unequalized"),
    replace(_TLQ, name="tlq_auto_dual", title="twin-log, auto with dual", transform="auto_dual"),
    replace(_TLQ, name="tlq_groups", title="twin-log, groups of up to 128", group=128),
    replace(_TLQ, name="tlq_tensor", title="twin-log, static scale", activations="tensor"),
    replace(_TLQ, name="tlq_ranges", title="twin-log, static scales by time", activations="timestep_range"),
)
TREATMENTS = {treatment.name: treatment for treatment in (*_OURS, *_PUBLISHED, *_ABLATIONS)}
DEFAULT = ("tlq", "codebook", *(treatment.name for treatment in _PUBLISHED))


def treatment_of(name: str) -> Treatment:
    """Raises UsageError with the nearest name."""
    if name in TREATMENTS:
        return TREATMENTS[name]
    near = nearest(name, TREATMENTS)
    raise UsageError(
        f"--methods: got {name!r}, needed one of {', '.join(TREATMENTS)}",
        hint=f"did you mean {near}?" if near else None,
    )
