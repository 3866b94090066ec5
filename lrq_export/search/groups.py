"""Group sizes of a real model: what a genome may hold, the model it stands for, and what that is worth.

Every gene is the group size of one input of the model, for its activations and for the weights of all layers that read
it: Q-DiT has one size for both (arXiv 2406.17343), and layers that read one tensor cannot round it in different ways.
Layers are treated as `q_dit` of `compare` treats them: uniform min-max weights per (row, group) with GPTQ, asymmetric
activations per (token, group).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lrq_export.calibrate.inputs import TIMESTEP
from lrq_export.calibrate.run import observe
from lrq_export.comparison.activations import Clock
from lrq_export.comparison.inputs import LayerInput
from lrq_export.comparison.judge import FILE, Judge, frechet_distance
from lrq_export.comparison.layer import Treated, treat
from lrq_export.comparison.run import layer_inputs, quantized
from lrq_export.comparison.transforms import Fitted
from lrq_export.comparison.treatments import TREATMENTS, Treatment
from lrq_export.errors import UsageError
from lrq_export.plan import target_layers
from lrq_export.progress import Progress, Silent, stage
from lrq_export.recipe import Recipe
from lrq_export.sampling import ConditionalSampler, scheduler_from
from lrq_export.search.evolution import Cost, Space, minus_mean_group
from lrq_export.search.state import Genome
from lrq_export.source import Inputs, Source, gather_inputs, open_source
from lrq_export.verify.ladder import draw, run_torch
from lrq_export.verify.metrics import nmse

LEAST, CHOICES = 16, 6  # the smallest group that is offered, and how many each input chooses from at most
NOISE_INPUTS, BATCH = 32, 32  # calibration inputs of `noise_error`, and those of one forward call
# Of `image_distance`: features of fewer images have no useful covariance, and a genome should cost seconds.
IMAGES, STEPS, IMAGE_SEED = 50, 4, 0

Objective = Callable[[Genome], float]


def treatment_of_group(group: int) -> Treatment:
    """`q_dit` with groups of this many columns, which divides the width."""
    return replace(TREATMENTS["q_dit"], group=group)


def group_sizes(width: int, *, least: int = LEAST, most: int = CHOICES) -> tuple[int, ...]:
    """Divisors of `width` from `least` to all of it, ascending, at most `most`: those nearest to equal ratios.

    The width alone if it has no smaller divisor in that range.
    """
    divisors = [size for size in range(min(least, width), width + 1) if width % size == 0]
    wanted = (least * (width / least) ** (step / (most - 1)) for step in range(most))
    return tuple(sorted({min(divisors, key=lambda size: abs(math.log(size / each))) for each in wanted}))


def search_space(layers: Iterable[LayerInput], *, least: int = LEAST, most: int = CHOICES) -> Space:
    """A gene for each input, named after the first layer that reads it."""
    choices = {source.layers[0]: group_sizes(source.width, least=least, most=most) for source in layers}
    return Space(tuple(choices), choices)


@dataclass(frozen=True)
class Subject:
    """A floating-point model, the inputs of its layers, and what its stand-ins are judged with."""

    source: Source
    model: nn.Module
    inputs: Inputs
    layers: list[LayerInput]
    recipe: Recipe

    @classmethod
    def observe(
        cls, source: Path, calibration: Path, recipe: Recipe, folder: Path, progress: Progress | None = None
    ) -> Subject:
        """Open a diffusers folder and watch it on calibration inputs; `folder` takes what was seen, and must stay.

        Raises InputError for bad files.
        """
        opened = open_source(source)
        inputs = gather_inputs(opened, recipe, calibration, None)
        names = target_layers(opened.model(), opened.family, recipe)
        shown = progress or Silent()
        with stage(shown, "calibrate", {}, len(inputs.calibration[TIMESTEP])):
            model = opened.load(opened.model())
            observed = observe(
                opened.family, model, names, inputs.calibration, recipe.calibration.batch, folder,
                lambda count: [shown.advance() for _ in range(count)],
            )  # fmt: skip
        return cls(opened, model, inputs, layer_inputs(opened, model, observed), recipe)


class StandIns:
    """Every input's layers treated at each of its group sizes, once, so that a genome only swaps modules.

    Holds one float32 weight for each (layer, group size).
    """

    def __init__(self, subject: Subject, space: Space, bits: int, act_bits: int, progress: Progress | None = None):
        """`space` is that of `search_space(subject.layers)`. Raises UsageError for one of other inputs."""
        if space.layers != tuple(source.layers[0] for source in subject.layers):
            raise UsageError(f"layers: got {list(space.layers)}, needed the {len(subject.layers)} inputs of the model")
        self.space, self._weights = space, sum(w.numel() for source in subject.layers for w in source.weights)
        self._treated: list[dict[int, Treated]] = []
        self._errors: list[dict[int, float]] = []
        fitted, clock, shown = Fitted(subject.layers), Clock(), progress or Silent()
        with torch.no_grad(), stage(shown, "stand-ins", {}, sum(map(len, space.choices.values()))):
            self._model, _ = quantized(subject.model, [], treatment_of_group(1), bits, act_bits, fitted)
            for source in subject.layers:
                treated = {}
                for group in space.choices[source.layers[0]]:
                    treated[group] = treat(source, treatment_of_group(group), bits, act_bits, clock, fitted)
                    shown.advance(source.layers[0])
                self._treated.append(treated)
                self._errors.append({group: _output_error(source, each) for group, each in treated.items()})
        self._swapped: list[int | None] = [None] * len(space.layers)

    def model(self, genome: Genome) -> nn.Module:
        """The quantized model of a genome: one model, whose layers the next call swaps.

        Raises UsageError for a genome of another space.
        """
        if genome not in self.space:
            raise UsageError(f"genome: got {genome}, needed one choice for each of {len(self.space.layers)} inputs")
        for index, (group, now) in enumerate(zip(genome, self._swapped, strict=True)):
            if group != now:
                for name, layer in self._treated[index][group].layers.items():
                    self._model.set_submodule(name, layer)
                self._swapped[index] = group
        return self._model

    def weight_bits(self, genome: Genome) -> float:
        """Stored bits of all weights, scales and zero points included."""
        return sum(self._treated[index][group].weight_bits for index, group in enumerate(genome))

    def bits_per_weight(self, genome: Genome) -> float:
        return self.weight_bits(genome) / self._weights

    def output_error(self, genome: Genome) -> float:
        """Σ over layers of tr (W - Ŵ) H (W - Ŵ)ᵀ / tr W H Wᵀ, H = E[x xᵀ]; activations count as exact."""
        return sum(self._errors[index][group] for index, group in enumerate(genome))


def _output_error(source: LayerInput, treated: Treated) -> float:
    error, correlation = 0.0, source.correlation.double()
    for name, weight in zip(source.layers, source.weights, strict=True):
        power = _power(weight, correlation)
        lost = _power(weight - treated.layers[name].weight, correlation)
        error += lost / power if power else 0.0
    return error


def _power(weight: torch.Tensor, correlation: torch.Tensor) -> float:
    """tr W H Wᵀ."""
    return float(((weight.double() @ correlation) * weight).sum())


# --- what a genome may cost

LIMITS: Mapping[str, Callable[[StandIns], Cost]] = {
    "bits": lambda stand_ins: stand_ins.weight_bits,
    "mean": lambda stand_ins: minus_mean_group,
}


# --- what a genome is worth


def noise_error(subject: Subject, stand_ins: StandIns) -> Objective:
    """ε-NMSE: squared error of the predicted noise on calibration inputs, relative to the floating-point model's."""
    rows = _spread_over_timesteps(subject.inputs.calibration[TIMESTEP], NOISE_INPUTS)
    inputs = {name: tensor[rows] for name, tensor in subject.inputs.calibration.items()}

    def noise(model: nn.Module) -> torch.Tensor:
        return run_torch(subject.source.family, model, inputs, BATCH)

    exact = noise(subject.model)
    return lambda genome: nmse(noise(stand_ins.model(genome)), exact)


def _spread_over_timesteps(timesteps: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows (all, if there are fewer), spread over timesteps (n,): the last ones can hold most of the error."""
    order = timesteps.argsort(stable=True)
    return order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]


def output_error(subject: Subject, stand_ins: StandIns) -> Objective:
    """`StandIns.output_error`: separable and instant, but for weights alone and blind to how errors add up."""
    return stand_ins.output_error


def image_distance(subject: Subject, stand_ins: StandIns) -> Objective:
    """Fréchet distance of the classifier's features from the floating-point model's images of the same seed.

    Stands for the FID that Q-DiT searches by. Raises UsageError for a source without a classifier.
    """
    path = subject.source.checkpoint.path / FILE
    if not path.is_file():
        raise UsageError(f"{path}: not found, needed a classifier", hint="search by another objective, e.g. noise")
    judge, sampling, inputs = Judge(path), subject.recipe.for_family(subject.source.family).sampling, subject.inputs
    drawn = subject.source.family.latents(inputs.evaluation, inputs.conditions)
    scheduler = scheduler_from(sampling.scheduler, subject.source.scheduler_config())

    def features(model: nn.Module):
        sampler = ConditionalSampler(model, scheduler, inputs.conditions, drawn)
        latents = draw(sampler, IMAGES, STEPS, IMAGE_SEED, sampling.guidance_scale)
        return judge.run(latents[-1])[0]

    exact = features(subject.model)
    return lambda genome: frechet_distance(features(stand_ins.model(genome)), exact)


OBJECTIVES: Mapping[str, Callable[[Subject, StandIns], Objective]] = {
    "noise": noise_error,
    "output": output_error,
    "frechet": image_distance,
}
