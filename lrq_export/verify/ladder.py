"""The parity ladder: each rung compares two neighbours of the chain and blames one thing when they differ.

R0  diffusers model             traceable model              blames the model adapter
R1  floating-point model        quantized torch model        the method's loss: reported, held to the recipe's gates
R2  quantized torch model       model.onnx                   blames trace and binding
R3  graph before each pass      graph after it               blames the rewrites (weights in floating point)
R4  model.onnx                  engine                       blames lowering and kernels
R5  floating-point trajectory   trajectory of the engine     what a user sees: same-seed images
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from graphs.float_model import float_model, weight_names
from graphs.traced import TracedGraph
from lrq_export.evaluate import ReadTensor, evaluate
from lrq_export.models.base import InputSpec, ModelFamily
from lrq_export.runtime import feeds
from lrq_export.sampling import ConditionalSampler, condition_rows
from lrq_export.verify.metrics import nmse, psnr
from lrq_export.verify.sliced import SlicedModel

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


def other_shapes(specs: dict[str, InputSpec], inputs: Inputs, seed: int) -> Inputs:
    """Random inputs of another batch, height, width and text length than the given ones, one timestep each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"samples": 3}
    made = {}
    for name, spec in specs.items():
        given = inputs.get(name)
        if given is None:
            continue
        for axis, extent in enumerate(spec.shape):
            if isinstance(extent, str) and extent not in sizes:
                # About half, one unit more with every free axis: cheap, never square, never the given size.
                units = given.shape[axis] // spec.multiple_of
                sizes[extent] = max(2, units // 2 + len(sizes)) * spec.multiple_of
        shape = [sizes[extent] if isinstance(extent, str) else extent for extent in spec.shape]
        if spec.shape == ("samples",):
            made[name] = given[torch.randint(len(given), (sizes["samples"],), generator=generator)]
        elif spec.optional:
            made[name] = torch.ones(shape)
        else:
            made[name] = torch.randn(shape, generator=generator) * given.float().std()
    return made


def rewrites(
    stages: list[tuple[str, TracedGraph]], read: ReadTensor | None, specs: dict[str, InputSpec], inputs: Inputs
) -> dict[str, float]:
    """R3: NMSE of each pass's graph against the one before it, by pass name; the first stage is the trace itself.

    Weight expressions are evaluated in float32: from source tensors, or from random ones when `read` is None.
    """
    read = read or random_source(stages[0][1])
    cases = [{name: tensor[:1] for name, tensor in inputs.items()}, other_shapes(specs, inputs, seed=3)]
    measured, before = {}, None
    for name, traced in stages:
        outputs = _run_in_floating_point(traced, read, [feeds(specs, case) for case in cases])
        if before is not None:
            measured[name] = max(nmse(after, was) for after, was in zip(outputs, before, strict=True))
        before = outputs
    return measured


def random_source(traced: TracedGraph) -> ReadTensor:
    """Random tensors in place of the source's, the same for the same name."""
    shapes = {}
    for expression in [weight.weight for weight in traced.linears.values()] + list(traced.tensors.values()):
        shapes[expression.source] = expression.source_shape

    def read(name: str) -> torch.Tensor:
        seed, shape = zlib.crc32(name.encode()), shapes[name]
        spread = 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread

    return read


def _run_in_floating_point(
    traced: TracedGraph, read: ReadTensor, cases: list[dict[str, np.ndarray]]
) -> list[np.ndarray]:
    """The output for every case; each weight is evaluated when the slice that reads it runs."""
    weights = {
        name: functools.partial(lambda expression: evaluate(expression, read).numpy(), expression)
        for name, expression in weight_names(traced).items()
    }
    sliced = SlicedModel(float_model(traced), weights=weights)
    outputs = {case: array for case, _, array in sliced.run([case.__getitem__ for case in cases])}
    return [outputs[index] for index in range(len(cases))]


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


def draw(
    transformer, scheduler, conditions: Mapping[str, torch.Tensor], images: int, steps: int, seed: int, guidance: float
) -> list[torch.Tensor]:
    """Latents after every step for `images` samples, rows of the conditions in turn; the last are the samples."""
    sampler = ConditionalSampler(transformer, scheduler, dict(conditions))
    available = condition_rows(conditions)
    latents: list[torch.Tensor] = []
    rows = [i % available for i in range(images)]
    generator = torch.Generator().manual_seed(seed)
    sampler(rows, num_inference_steps=steps, generator=generator, guidance_scale=guidance, trajectory=latents)
    return latents


def image_errors(got: torch.Tensor, reference: torch.Tensor) -> dict:
    """Same-seed PSNR in dB: of each image, and of all together (from the mean of the squared errors)."""
    each = [psnr(mine, theirs) for mine, theirs in zip(got, reference, strict=True)]
    return {"psnr_db": each, "psnr_total_db": psnr(got, reference)}
