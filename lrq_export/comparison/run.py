"""`compare`: quantize one model in many ways and judge them side by side, on the same inputs and the same seeds.

Everything is simulated in torch: no graph, no package. What can be deployed computes as its package would, up to the
rounding of float32; quantizers of ours are all compared on the rotations that the default one chooses.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lrq_export.calibrate.inputs import TIMESTEP, batches
from lrq_export.calibrate.observed import Observed
from lrq_export.calibrate.run import observe
from lrq_export.comparison.activations import Clock
from lrq_export.comparison.inputs import LayerInput
from lrq_export.comparison.judge import FILE, Judge, accuracy, frechet_distance
from lrq_export.comparison.kept import read_kept, write_kept
from lrq_export.comparison.layer import Treated, treat
from lrq_export.comparison.ranking import setting_of
from lrq_export.comparison.transforms import Fitted
from lrq_export.comparison.treatments import Treatment, treatment_of
from lrq_export.errors import UsageError
from lrq_export.machine import describe_machine, describe_processor, versions
from lrq_export.plan import target_layers
from lrq_export.progress import Progress, Silent, stage
from lrq_export.recipe import Recipe
from lrq_export.sampling import ConditionalSampler, check_steps, condition_rows, scheduler_from
from lrq_export.source import (
    Inputs,
    Source,
    calibration_path,
    conditions_path,
    fingerprint,
    gather_inputs,
    open_source,
)
from lrq_export.verify.ladder import draw
from lrq_export.verify.metrics import nmse, psnr

SCHEMA = 1
BATCH = 32  # samples of one forward call


def compare(
    source: str | Path,
    methods: Sequence[str],
    *,
    bits: Sequence[int] = (4, 3),
    act_bits: Sequence[int] = (8, 6),
    recipe: Recipe | None = None,
    calibration: str | Path | None = None,
    conditions: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    judge: str | Path | None = None,
    kept: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Treat the model of the diffusers folder `source` by every method at every number of bits; returns the report.

    `seeds` draw `recipe.sampling.images` images each. `judge` is an ONNX classifier (see `comparison.judge`), the
    source's own `classifier.onnx` by default. `kept` is a JSON file that holds the report while it grows: what it has
    under the same conditions is not measured again, and stays in the report. Raises UsageError for unknown methods or
    bits and for a `kept` that holds anything else, InputError for bad files.
    """
    recipe, progress, kept = recipe or Recipe(), progress or Silent(), Path(kept) if kept is not None else None
    treatments = [treatment_of(name) for name in dict.fromkeys(methods)]
    _check_bits(bits, act_bits)
    opened = open_source(Path(source))
    files = [Path(path) if path is not None else None for path in (calibration, conditions)]
    inputs, judge_file = gather_inputs(opened, recipe, *files), _judge_file(opened, judge)
    judge = None if judge_file is None else Judge(judge_file)
    layers = target_layers(opened.model(), opened.family, recipe)
    files = [calibration_path(opened, files[0]), conditions_path(opened, files[1]), judge_file]
    digest = fingerprint(opened, f"{recipe.model_dump_json()} {list(seeds)} {describe_processor()}", files, versions())
    report = read_kept(kept, digest)
    known = {(row["method"], *setting_of(row)) for row in report["rows"]} if report else set()
    configurations = [(t, w, a) for w in bits for a in act_bits for t in treatments if (t.name, w, a) not in known]
    if report is not None and not configurations:
        return report
    with tempfile.TemporaryDirectory() as folder:
        with stage(progress, "calibrate", {}, len(inputs.calibration[TIMESTEP])):
            model = opened.load(opened.model())
            observed = observe(
                opened.family, model, layers, inputs.calibration, recipe.calibration.batch, Path(folder),
                lambda count: [progress.advance() for _ in range(count)],
            )  # fmt: skip
        with stage(progress, "reference", {}, len(seeds)):
            bench = Bench(opened, model, inputs, recipe, seeds, judge, progress)
        fitted = Fitted(layer_inputs(opened, model, observed))
        report = report or {
            "schema": SCHEMA,
            "conditions": digest,
            "source": {"name": Path(source).resolve().name, "class_name": opened.family.class_name},
            "machine": describe_machine(),
            "recipe": bench.recipe.model_dump(mode="json", by_alias=True),
            "warnings": inputs.warnings,
            "seeds": list(seeds),
            "images": recipe.sampling.images * len(seeds),
            "reference": bench.reference_scores(),
            "inputs": [_describe(source) for source in fitted.inputs],
            "rows": [],
        }
        with stage(progress, "compare", {}, len(configurations)):
            for treatment, w, a in configurations:
                report["rows"].append(_row(bench, fitted, treatment, w, a))
                write_kept(kept, report)
                progress.advance(f"{treatment.name} W{w}A{a}: {report['rows'][-1]['psnr_db']:.1f} dB")
    return report


def layer_inputs(source: Source, model: nn.Module, observed: Observed) -> list[LayerInput]:
    """Every input of the model that quantized layers read, with these layers."""
    return [
        LayerInput(
            tuple(layers), tuple(model.get_submodule(layer) for layer in layers),
            source.family.head_width(model, layers[0]), observed,
        )
        for layers in observed.siblings()
    ]  # fmt: skip


def quantized(
    model: nn.Module, sources: Iterable[LayerInput], treatment: Treatment, bits: int, act_bits: int, fitted: Fitted
) -> tuple[nn.Module, list[Treated]]:
    """A copy of `model`, its layers replaced by treated ones; the floating-point weights of others are shared."""
    clock, treated = Clock(), []
    for source in sources:
        treated.append(treat(source, treatment, bits, act_bits, clock, fitted))
    stand_in = _sharing_copy(model)
    for each in treated:
        for name, layer in each.layers.items():
            stand_in.set_submodule(name, layer)
    stand_in.register_forward_pre_hook(lambda module, args, kwargs: _tell_time(clock, kwargs), with_kwargs=True)
    return stand_in, treated


@dataclass
class Scores:
    """What one model drew and predicted."""

    noise: torch.Tensor  # of the evaluation inputs
    images: list[torch.Tensor]  # by seed, the latents (images, ...)


class Bench:
    """The floating-point model's answers, and how others compare."""

    def __init__(
        self, source: Source, model: nn.Module, inputs: Inputs, recipe: Recipe, seeds: Sequence[int],
        judge: Judge | None, progress: Progress,
    ):  # fmt: skip
        self.source, self.model, self.inputs = source, model, inputs
        self.recipe = recipe = recipe.for_family(source.family)
        self.seeds, self.judge = seeds, judge
        self.scheduler = scheduler_from(recipe.sampling.scheduler, source.scheduler_config())
        self.drawn = source.family.latents(inputs.evaluation, inputs.conditions)
        check_steps(self.scheduler, recipe.sampling.steps, self.drawn)
        self.exact = Scores(self._noise(model), [])
        for seed in seeds:
            self.exact.images.append(self._draw(model, seed))
            progress.advance()

    def scores(self, model: nn.Module) -> dict[str, Any]:
        """ε-NMSE, same-seed PSNR by seed and its mean, and the judge's view if there is one."""
        got = Scores(self._noise(model), [self._draw(model, seed) for seed in self.seeds])
        by_seed = [psnr(mine, exact) for mine, exact in zip(got.images, self.exact.images, strict=True)]
        return {
            "noise_nmse": nmse(got.noise, self.exact.noise),
            "psnr_db": float(np.mean(by_seed)),
            "psnr_db_by_seed": by_seed,
        } | self._judged(got)

    def reference_scores(self) -> dict[str, Any]:
        return self._judged(self.exact)

    def _judged(self, got: Scores) -> dict[str, float | None]:
        """Accuracy, if there is a class for every row of the conditions, and Fréchet distance.

        The distance is to the floating-point model's images of the same seeds.
        """
        if self.judge is None:
            return {"accuracy": None, "frechet": None}
        features, logits = self.judge.run(torch.cat(got.images))
        reference, _ = self.judge.run(torch.cat(self.exact.images))
        classes, per_seed = condition_rows(self.inputs.conditions), self.recipe.sampling.images
        labels = np.tile(np.arange(per_seed) % classes, len(self.seeds))
        right = accuracy(logits, labels) if classes == logits.shape[1] else None
        return {"accuracy": right, "frechet": frechet_distance(features, reference)}

    @torch.no_grad()
    def _noise(self, model: nn.Module) -> torch.Tensor:
        """The predicted noise of every evaluation input, in batches of one timestep."""
        parts = [self.source.family.call(model, part) for part in batches(self.inputs.evaluation, BATCH)]
        return torch.cat(parts)

    def _draw(self, model: nn.Module, seed: int) -> torch.Tensor:
        sampling = self.recipe.sampling
        sampler = ConditionalSampler(model, self.scheduler, self.inputs.conditions, self.drawn)
        return draw(sampler, sampling.images, sampling.steps, seed, sampling.guidance_scale)[-1]


def _row(bench: Bench, fitted: Fitted, treatment: Treatment, bits: int, act_bits: int) -> dict[str, Any]:
    started = time.perf_counter()
    with torch.no_grad():
        model, treated = quantized(bench.model, fitted.inputs, treatment, bits, act_bits, fitted)
    seconds = time.perf_counter() - started
    weights = sum(layer.weight.numel() for each in treated for layer in each.layers.values())
    return {
        "method": treatment.name, "title": treatment.title, "published": treatment.published, "note": treatment.note,
        "obstacle": treatment.obstacle, "bits": bits, "act_bits": act_bits,
        "bits_per_weight": sum(each.weight_bits for each in treated) / weights, "seconds": seconds,
        "transforms": {next(iter(each.layers)): each.reason for each in treated},
    } | bench.scores(model)  # fmt: skip


def _describe(source: LayerInput) -> dict[str, Any]:
    """J beside what tells outliers: kurtosis, and peak to root mean square."""
    moments = source.observed.statistics.layer(source.layers[0])
    return {
        "layers": list(source.layers), "width": source.width, "rms": moments.rms, "kurtosis": moments.kurtosis,
        "peak": moments.absmax, "peak_to_rms": moments.peak_to_rms,
    }  # fmt: skip


def _judge_file(source: Source, given: str | Path | None) -> Path | None:
    beside = source.checkpoint.path / FILE
    return Path(given) if given is not None else beside if beside.is_file() else None


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters and buffers are those of `model`."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _tell_time(clock: Clock, arguments: dict[str, Any]) -> None:
    clock.timestep = float(arguments[TIMESTEP].flatten()[0])


def _check_bits(bits: Sequence[int], act_bits: Sequence[int]) -> None:
    for flag, got, allowed in (("--bits", bits, (2, 3, 4)), ("--acts", act_bits, (4, 6, 8, 16))):
        wrong = [each for each in got if each not in allowed]
        if wrong or not got:
            raise UsageError(f"{flag}: got {wrong or 'nothing'}, needed some of {', '.join(map(str, allowed))}")
