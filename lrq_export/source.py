"""What a build starts from: a checkpoint, its model family, and the inputs to calibrate and to judge it with."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrq_export import trial
from lrq_export.calibrate.inputs import (
    check_names,
    check_shapes,
    latent_sizes,
    load_inputs,
    spread_rows,
    synthetic_inputs,
)
from lrq_export.checkpoint import (
    CONFIG,
    Checkpoint,
    TensorFile,
    check_finite,
    check_tensors,
    open_checkpoint,
)
from lrq_export.errors import InputError
from lrq_export.models import current_config, family_of
from lrq_export.models.base import SAMPLES, ModelFamily
from lrq_export.package import sha256_file
from lrq_export.recipe import Recipe
from lrq_export.sampling import NEGATIVE
from lrq_export.untrusted_json import read_json_object

CALIBRATION, CONDITIONS = "calibration.safetensors", "conditions.safetensors"
SCHEDULER = "scheduler_config.json"
EVALUATION_SAMPLES = 64  # inputs that judge R1, none of them seen by calibration where the file holds enough
SYNTHETIC_WARNING = (
    "no calibration was given: statistics come from Gaussian latents, not from real trajectories; "
    "pass --calibration FILE, or build from a pipeline folder with --prompts"
)


@dataclass(frozen=True)
class Source:
    """An opened and checked source. `config` is complete: what the file leaves out has diffusers' defaults."""

    checkpoint: Checkpoint
    family: ModelFamily
    config: dict[str, Any]

    def model(self) -> nn.Module:
        """The diffusers model without its weights (parameters on the meta device)."""
        return self.family.construct(self.config)

    def load(self, model: nn.Module) -> nn.Module:
        """Give `model` its weights in float32. Raises InputError for NaN or Inf."""
        for name, parameter in list(model.named_parameters()):
            tensor = self.checkpoint.read(name)
            check_finite(name, tensor)
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[leaf] = nn.Parameter(tensor.to(torch.float32).clone(), requires_grad=False)
            assert parameter.shape == tensor.shape, name  # open_source checked every shape
        return model

    def scheduler_config(self) -> dict[str, Any] | None:
        """The scheduler_config.json beside the transformer or in the pipeline; None when there is none.

        Without its infinities: diffusers writes the default of `lambda_min_clipped` as -Infinity, which is no JSON.
        """
        places = [self.checkpoint.path / SCHEDULER]
        if self.checkpoint.pipeline_path is not None:
            places.append(self.checkpoint.pipeline_path / "scheduler" / SCHEDULER)
        for path in places:
            if path.is_file():
                return {key: value for key, value in read_json_object(path).items() if value not in (inf, -inf)}
        return None


def open_source_of(package: Path, manifest: Mapping[str, Any], path: Path) -> Source:
    """Open the source of a package. Raises InputError for another one than the package was built from."""
    opened = open_source(path)
    if opened.checkpoint.fingerprint() != manifest["source"]["fingerprint"]:
        raise InputError(
            f"{path}: is not the source that {package} was built from: its fingerprint differs",
            hint="pass the folder that the package was built from, or leave out --source",
        )
    return opened


def open_source(path: Path) -> Source:
    """Open a transformer or pipeline folder and check config and tensors against the true class.

    Raises InputError for anything missing, unknown, truncated or of the wrong shape.
    """
    checkpoint = open_checkpoint(path)
    config_file = checkpoint.path / CONFIG
    config = current_config(checkpoint.config)
    family = family_of(config["_class_name"], str(config_file))
    check_tensors(checkpoint, trial.shapes(config_file, family, config))
    model = trial.construct(config_file, family, config)
    trial.run(config_file, family, config)
    return Source(checkpoint, family, {"_class_name": family.class_name} | dict(model.config))


@dataclass(frozen=True)
class Inputs:
    """Denoiser inputs split in two, conditions to sample with, and what the user should be warned of."""

    calibration: dict[str, torch.Tensor]
    evaluation: dict[str, torch.Tensor]
    conditions: dict[str, torch.Tensor]
    warnings: list[str] = field(default_factory=list)


def gather_inputs(source: Source, recipe: Recipe, calibration: Path | None, conditions: Path | None) -> Inputs:
    """Read or make the inputs of a build: given files, else those beside the transformer, else synthetic ones.

    Raises InputError for files of the wrong names, shapes or values.
    """
    specs, warnings = source.family.inputs(source.config), []
    path = calibration_path(source, calibration)
    if path is not None:
        everything = load_inputs(path, specs)
    else:
        warnings.append(SYNTHETIC_WARNING)
        settings = recipe.calibration
        total = settings.samples + min(settings.samples, EVALUATION_SAMPLES)
        sizes = latent_sizes(source.config)
        everything = synthetic_inputs(specs, total, settings.timesteps, settings.seed, sizes=sizes)
    chosen, rest = _split(len(everything["hidden_states"]), recipe.calibration.samples)
    if not rest:
        warnings.append("the calibration file holds too few samples to keep some apart: noise is judged on seen inputs")
        rest = chosen
    rest = [rest[i] for i in spread_rows(len(rest), EVALUATION_SAMPLES)]
    evaluation = _rows(everything, rest)
    return Inputs(_rows(everything, chosen), evaluation, _conditions(source, conditions, evaluation), warnings)


def fingerprint(source: Source, recipe_text: str, files: list[Path | None], versions: Mapping[str, str]) -> str:
    """SHA-256 over everything that decides the bytes of a package."""
    digest = hashlib.sha256()
    parts = [source.checkpoint.fingerprint(), str(source.scheduler_config()), recipe_text]
    parts += [sha256_file(path) if path is not None else "-" for path in files]
    parts += [f"{name}={version}" for name, version in sorted(versions.items())]
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def calibration_path(source: Source, given: Path | None) -> Path | None:
    """The recorded inputs to calibrate on: the given ones, else those beside the transformer, else none."""
    return given if given is not None else _beside(source, CALIBRATION)


def conditions_path(source: Source, given: Path | None) -> Path | None:
    """The conditions file to sample with: the given one, else the one beside the transformer, else none."""
    return given if given is not None else _beside(source, CONDITIONS)


def _beside(source: Source, name: str) -> Path | None:
    path = source.checkpoint.path / name
    return path if path.is_file() else None


def _split(total: int, samples: int) -> tuple[list[int], list[int]]:
    chosen = spread_rows(total, samples)
    taken = set(chosen)
    return chosen, [row for row in range(total) if row not in taken]


def _rows(inputs: Mapping[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in inputs.items()}


def _conditions(source: Source, given: Path | None, evaluation: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything the transformer is conditioned on besides latents and timestep, one row a prompt."""
    path = conditions_path(source, given)
    if path is None:
        rest = {name: t for name, t in evaluation.items() if name not in ("hidden_states", "timestep")}
        return _rows(rest, spread_rows(len(evaluation["hidden_states"]), 8))
    specs = source.family.inputs(source.config)
    expected = {name: spec for name, spec in specs.items() if name not in ("hidden_states", "timestep")}
    expected |= {  # as many rows as they like, but the sizes of the others
        NEGATIVE + name: replace(spec, shape=(NEGATIVE + SAMPLES, *spec.shape[1:]), optional=True)
        for name, spec in expected.items()
    }
    file = TensorFile(path)
    check_names(file, expected)
    check_shapes(file, expected)
    tensors = file.read_all()
    for name, tensor in tensors.items():
        check_finite(f"{path}: {name}", tensor)
        expected[name].check_labels(f"{path}: {name}", tensor)
    return {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
