"""What the floating-point model answered, kept in the package so that `verify` can judge it from the files alone.

reference.safetensors: `inputs.*` and `noise` (R1), `conditions.*` and `latents` (steps, images, ...) of a whole
sampling trajectory (R5); in its metadata the NMSE of rung R0 and what calibration saw of each layer.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from lrq_export.checkpoint import TensorFile
from lrq_export.errors import InputError
from lrq_export.models.base import ModelFamily
from lrq_export.package import save_tensors_atomic
from lrq_export.recipe import Sampling
from lrq_export.sampling import ConditionalSampler
from lrq_export.source import Inputs, Source
from lrq_export.verify.ladder import draw, run_torch
from lrq_export.verify.metrics import nmse

FILE = "reference.safetensors"


class Facts(BaseModel):
    """What the metadata of the file holds."""

    adapter_nmse: float
    statistics: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Reference:
    """The floating-point model's answers, read back."""

    inputs: dict[str, torch.Tensor]
    noise: torch.Tensor
    conditions: dict[str, torch.Tensor]
    latents: torch.Tensor  # (steps, images, ...)
    adapter_nmse: float  # R0, as measured when the source was at hand
    statistics: dict[str, dict[str, float]]  # J, kurtosis, peak to RMS of every layer's input

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / FILE).exists()

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """Raises InputError when the file is missing or damaged, or holds something else."""
        file = TensorFile(folder / FILE)
        tensors = file.read_all()
        try:
            facts = Facts.model_validate_json(file.metadata["facts"])
            noise, latents = tensors["noise"], tensors["latents"]
        except (KeyError, ValueError) as error:  # the latter: of pydantic
            raise InputError(
                f"{folder / FILE}: not the answers of a model: {error}", hint="build the package again"
            ) from error

        def group(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        return cls(group("inputs."), noise, group("conditions."), latents, facts.adapter_nmse, facts.statistics)


def write_reference(
    folder: Path, source: Source, model: nn.Module, scheduler, inputs: Inputs, sampling: Sampling, statistics: dict
) -> None:
    """Run the loaded floating-point `model` on the evaluation inputs and along a trajectory; leaves it traceable."""
    noise = run_torch(source.family, model, inputs.evaluation)
    drawn = source.family.latents(inputs.evaluation, inputs.conditions)
    sampler = ConditionalSampler(model, scheduler, inputs.conditions, drawn)
    latents = draw(sampler, sampling.images, sampling.steps, sampling.seed, sampling.guidance_scale)
    facts = {"adapter_nmse": adapter_error(source.family, model, inputs.evaluation), "statistics": statistics}
    tensors = {f"inputs.{name}": tensor for name, tensor in inputs.evaluation.items()}
    tensors |= {f"conditions.{name}": tensor for name, tensor in inputs.conditions.items()}
    tensors |= {"noise": noise, "latents": torch.stack(latents)}
    metadata = {"format": "lrq-export reference", "facts": json.dumps(facts, sort_keys=True)}
    save_tensors_atomic(folder / FILE, tensors, metadata)


def adapter_error(family: ModelFamily, model: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """R0: NMSE of the traceable form of `model` (edited in place) against the diffusers form, with and without mask."""
    few = {name: tensor[:2] for name, tensor in inputs.items()}
    specs = family.inputs(dict(model.config))
    masked = dict(few)
    for name, spec in specs.items():
        if spec.optional:
            shape = [few["hidden_states"].shape[0], few["encoder_hidden_states"].shape[1]]
            masked[name] = torch.ones(shape)
            masked[name][1:, shape[1] // 2 :] = 0  # half of the text is hidden from all but the first sample
    before = [run_torch(family, model, case) for case in (few, masked)]
    family.make_traceable(model)
    after = [run_torch(family, model, case) for case in (few, masked)]
    return max(nmse(got, was) for got, was in zip(after, before, strict=True))
