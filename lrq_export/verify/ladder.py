"""The parity ladder: each rung compares two neighbours of the chain and blames one thing when they differ.

R0  diffusers model             traceable model              blames the model adapter
R1  floating-point model        quantized torch model        the method's loss: reported, held to the recipe's gates
R2  quantized torch model       model.onnx                   blames trace and binding
R3  graph before each pass      graph after it               blames the rewrites (weights in floating point)
R4  model.onnx                  engine                       blames lowering and kernels
R5  floating-point trajectory   trajectory of the engine     what a user sees: same-seed images
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from lrq_export.models.base import InputSpec, ModelFamily
from lrq_export.runtime import feeds
from lrq_export.sampling import ConditionalSampler, condition_rows
from lrq_export.verify.metrics import nmse, psnr

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rung:
    """One comparison. `passed` None: there is no bound to hold it to."""

    rung: str
    title: str
    blames: str
    metric: str
    value: float
    bound: float | None
    passed: bool | None
    note: str = ""

    def to_json(self) -> dict:
        # JSON has no infinity: an exact match in dB and a NaN output both say so in the note.
        finite = math.isfinite(self.value)
        note = self.note if finite else f"{self.note} ({self.value})".strip()
        return asdict(self) | {"value": self.value if finite else None, "note": note}


def at_most(rung: str, title: str, blames: str, value: float, bound: float | None, note: str = "") -> Rung:
    return Rung(rung, title, blames, "NMSE", value, bound, None if bound is None else value <= bound, note)


@torch.no_grad()
def run_torch(family: ModelFamily, model: nn.Module, inputs: Inputs, batch: int = 8) -> torch.Tensor:
    """The model's output (samples, ...) on all inputs, a batch at a time."""
    count = len(inputs["hidden_states"])
    parts = [
        family.call(model, {name: tensor[start : start + batch] for name, tensor in inputs.items()})
        for start in range(0, count, batch)
    ]
    return torch.cat(parts)


def run_session(session, specs: dict[str, InputSpec], inputs: Inputs, batch: int = 8) -> np.ndarray:
    """The output (samples, ...) of an ONNX Runtime session on all inputs, a batch at a time."""
    count = len(inputs["hidden_states"])
    parts = []
    for start in range(0, count, batch):
        part = {name: tensor[start : start + batch] for name, tensor in inputs.items()}
        parts.append(session.run(None, feeds(specs, part))[0])
    return np.concatenate(parts)


def layer_output_errors(
    family: ModelFamily,
    model: nn.Module,
    quantized: Callable[[str], Callable[[torch.Tensor], torch.Tensor]],
    layers: list[str],
    inputs: Inputs,
) -> dict[str, float]:
    """NMSE of every quantized layer's output on the floating-point model's own activations, by layer.

    `quantized(layer)` gives the quantized layer as a function in the floating-point model's basis.
    """
    sums: dict[str, list[float]] = {}

    def watch(name: str) -> Callable:
        replacement = quantized(name)

        def hook(module: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float((replacement(arguments[0]) - output).double().square().sum())
            total[1] += float(output.double().square().sum())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    try:
        run_torch(family, model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: error / power if power else 0.0 for name, (error, power) in sums.items()}


def noise_error_by_timestep(got, reference, timesteps: torch.Tensor) -> list[dict[str, float]]:
    """R1 split by timestep, earliest step of the sampling (largest timestep) first."""
    rows = []
    for timestep in sorted({float(t) for t in timesteps}, reverse=True):
        chosen = (timesteps.float() == timestep).numpy()
        rows.append({"timestep": timestep, "nmse": nmse(np.asarray(got)[chosen], np.asarray(reference)[chosen])})
    return rows


def trajectory_errors(got: list[torch.Tensor], reference: torch.Tensor) -> list[dict[str, float]]:
    """Per sampling step, the NMSE of the latents; reference (steps, images, ...)."""
    return [
        {"step": i + 1, "nmse": nmse(mine, theirs)} for i, (mine, theirs) in enumerate(zip(got, reference, strict=True))
    ]


def draw(sampler: ConditionalSampler, images: int, steps: int, seed: int, guidance: float) -> list[torch.Tensor]:
    """Latents after every step for `images` samples, rows of the conditions in turn; the last are the samples."""
    available = condition_rows(sampler.conditions)
    latents: list[torch.Tensor] = []
    rows = [i % available for i in range(images)]
    generator = torch.Generator().manual_seed(seed)
    sampler(rows, num_inference_steps=steps, generator=generator, guidance_scale=guidance, trajectory=latents)
    return latents


def image_errors(got: torch.Tensor, reference: torch.Tensor) -> dict:
    """Same-seed PSNR in dB: of each image, and of all together (from the mean of the squared errors)."""
    each = [psnr(mine, theirs) for mine, theirs in zip(got, reference, strict=True)]
    return {"psnr_db": each, "psnr_total_db": psnr(got, reference)}
