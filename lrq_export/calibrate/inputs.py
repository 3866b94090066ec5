"""Denoiser inputs for calibration: read from a recorded file and checked, or synthetic; then grouped into batches.

Inputs are a dict of float32 tensors named as the model's forward arguments (nested ones dotted, as in
`added_cond_kwargs.resolution`); the first axis of each counts samples. Integers up to 2^24 are exact in float32, and
timesteps and masks stay far below. Class labels are int64, for the torch model looks them up in a table.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lrq_export.checkpoint import TensorFile, check_finite
from lrq_export.errors import InputError
from lrq_export.models.base import SAMPLES, InputSpec, Sizes
from lrq_export.recipe import nearest

TIMESTEP = "timestep"
SYNTHETIC_UNITS = 16  # size of a free dimension that the caller leaves open, in units of its multiple_of
PIXELS_PER_LATENT = 8  # of the image autoencoders that diffusion transformers use
_GOLDEN_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, made odd


def load_inputs(path: Path, expected: Mapping[str, InputSpec], samples: int | None = None) -> dict[str, torch.Tensor]:
    """Recorded inputs in the order of `expected`, in its dtypes; at most `samples` rows, spread over the file.

    Raises InputError for a damaged file, a missing or unknown name, a wrong rank or size, sizes that disagree between
    tensors, no rows, NaN or Inf, labels of no class.
    """
    file = TensorFile(path)
    check_names(file, expected)
    sizes = check_shapes(file, expected)
    rows = spread_rows(sizes[SAMPLES], sizes[SAMPLES] if samples is None else samples)
    inputs = {}
    for name in expected:
        if name in file.entries:
            tensor = file.read(name)
            check_finite(f"{path}: {name}", tensor)
            expected[name].check_labels(f"{path}: {name}", tensor)
            inputs[name] = tensor[rows].to(expected[name].dtype)
    return inputs


def synthetic_inputs(
    expected: Mapping[str, InputSpec],
    samples: int,
    timesteps: int,
    seed: int,
    num_train_timesteps: int = 1000,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Gaussian inputs for a model nobody recorded: `samples` rows over `timesteps` steps, evenly from last to first.

    `sizes` gives the free dimensions by name, for example {"height": 32, "width": 32, "text": 120}. Labels are drawn
    from all classes, optional inputs left out. They show a model pure noise at every timestep, so prefer recorded ones.
    """
    sizes = {**_free_sizes(expected), **(sizes or {}), SAMPLES: samples}
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, spec in expected.items():
        if spec.optional:
            continue
        shape = [sizes[extent] if isinstance(extent, str) else extent for extent in spec.shape]
        if name == TIMESTEP:
            steps = _steps(spec, timesteps, num_train_timesteps)
            inputs[name] = steps[torch.arange(samples) % timesteps].clone()
        elif spec.classes is not None:
            inputs[name] = torch.randint(spec.classes, shape, generator=generator)
        elif (size_condition := _size_condition(name, sizes)) is not None:
            inputs[name] = torch.tensor(size_condition, dtype=torch.float32).expand(shape).clone()
        elif spec.between is not None:
            low, high = spec.between
            inputs[name] = low + (high - low) * torch.rand(shape, generator=generator)
        else:
            inputs[name] = torch.randn(shape, generator=generator)
    return inputs


def _steps(spec: InputSpec, timesteps: int, num_train_timesteps: int) -> torch.Tensor:
    """Timesteps from last to first: numbers of training steps, or between what the model takes in their place."""
    first, last = spec.between or (0, num_train_timesteps - 1)
    steps = torch.linspace(last, first, timesteps, dtype=torch.float64)
    return (steps if spec.between else steps.round()).to(torch.float32)


def latent_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The height and width of latents that a diffusers config says, as `synthetic_inputs` takes them."""
    size = config.get("sample_size")
    return {} if size is None else {"height": size, "width": size}


def batches(inputs: Mapping[str, torch.Tensor], batch: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of at most `batch` rows that share one timestep, the latest (noisiest) timestep first.

    Without a timestep input, batches follow the order of the rows.
    """
    count = next(iter(inputs.values())).shape[0]
    timestep = inputs.get(TIMESTEP, torch.zeros(count))
    for value in torch.unique(timestep, sorted=True).flip(0):
        for rows in torch.nonzero(timestep == value).flatten().split(batch):
            yield {name: tensor[rows] for name, tensor in inputs.items()}


def spread_rows(total: int, samples: int) -> list[int]:
    """`samples` of `total` rows (all, if there are fewer), ascending, evenly spread in every sense that matters.

    Taking every k-th row would fall in step with the pattern of the rows: always one timestep of a trajectory, or only
    the unconditional half of guided batches. Rows of lowest `priority` are as evenly spread but never in step.
    """
    return sorted(sorted(range(total), key=priority)[:samples])


def priority(row: int) -> int:
    """Row numbers walked by the golden ratio: the lowest lie at near-even gaps, in step with no period."""
    return row * _GOLDEN_STEP % 2**64


def check_names(file: TensorFile, expected: Mapping[str, InputSpec]) -> None:
    """Raise InputError for a tensor that the model does not take, is missing, or is not of real numbers."""
    for name, entry in file.entries.items():
        if entry.dtype.is_complex:
            raise InputError(f"{file.path}: {name}: got {entry.dtype}, needed real numbers")
    unknown = sorted(file.entries.keys() - expected.keys())
    missing = [name for name, spec in expected.items() if not spec.optional and name not in file.entries]
    if unknown:
        near = nearest(unknown[0], missing or expected)
        raise InputError(
            f"{file.path}: got an input {unknown[0]}, needed names of the model's forward arguments",
            hint=f"did you mean {near}?" if near else f"the model takes {', '.join(expected)}",
        )
    if missing:
        held = ", ".join(file.entries) or "nothing"
        raise InputError(
            f"{file.path}: {missing[0]} is missing: got {held}, needed {', '.join(missing)} too",
            hint="record it with lrq_export.record(pipeline, prompts, path)",
        )


def check_shapes(file: TensorFile, expected: Mapping[str, InputSpec]) -> Sizes:
    """Sizes of the free dimensions by name. Raises InputError when one is wrong or two tensors disagree on it."""
    sizes = Sizes(f"{file.path}: ", hint="record it from the model that the checkpoint holds")
    for name, spec in expected.items():
        if name in file.entries:
            sizes.admit(name, file.entries[name].shape, spec)
    return sizes


def _free_sizes(expected: Mapping[str, InputSpec]) -> dict[str, int]:
    """A default size for every free dimension."""
    sizes: dict[str, int] = {}
    for spec in expected.values():
        for extent in spec.shape:
            if isinstance(extent, str):
                most = spec.most_units(extent)
                units = SYNTHETIC_UNITS if most is None else min(SYNTHETIC_UNITS, most)
                sizes.setdefault(extent, units * spec.unit(extent))
    return sizes


def _size_condition(name: str, sizes: Mapping[str, int]) -> tuple[float, ...] | None:
    """Inputs that tell a model its image size: noise in their place would be an image size that no one asks for."""
    if not name.endswith((".resolution", ".aspect_ratio")) or not {"height", "width"} <= sizes.keys():
        return None
    height, width = sizes["height"], sizes["width"]
    if name.endswith(".aspect_ratio"):
        return (height / width,)
    return (float(height * PIXELS_PER_LATENT), float(width * PIXELS_PER_LATENT))
