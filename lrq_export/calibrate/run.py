"""Run the floating-point model on calibration inputs and watch the input of every planned linear layer."""

import json
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from lrq_export.calibrate.correlations import MEMORY_LIMIT, Correlations
from lrq_export.calibrate.inputs import TIMESTEP, batches
from lrq_export.calibrate.observed import CORRELATIONS, READS, TOKENS, Observed
from lrq_export.calibrate.statistics import Statistics
from lrq_export.calibrate.tokens import TokenSample
from lrq_export.models.base import ModelFamily
from lrq_export.package import STATS

Watch = Callable[[str, float, torch.Tensor], None]


def observe(
    family: ModelFamily,
    model: nn.Module,
    layers: Iterable[str],
    inputs: dict[str, torch.Tensor],
    batch: int,
    folder: Path,
    done: Callable[[int], None] = lambda samples: None,
    *,
    correlations: bool = True,
    statistics: Path | None = None,
    limit: int = MEMORY_LIMIT,
) -> Observed:
    """Watch the inputs of `layers` while the model runs on `inputs`, and write what was seen into `folder`.

    `statistics` is where to write stats.safetensors, if not there. Correlations of a large model take several passes,
    each within `limit` bytes. Batches hold one timestep each and come in a fixed order, so the same inputs give the
    same files. `done` is told the samples of each batch of the first pass. Raises InputError for NaN or Inf.
    """
    layers, moments, tokens = list(layers), Statistics(), TokenSample(len(inputs[TIMESTEP]))
    reads = SharedInputs()
    matrices = Correlations(limit=limit)

    def first_pass(layer: str, timestep: float, x: torch.Tensor) -> None:
        moments.observe(layer, timestep, x)
        if reads.first(layer, x) == layer:
            tokens.observe(layer, timestep, x)
            if correlations:
                matrices.observe(layer, x)

    _watch(family, model, layers, inputs, batch, first_pass, done)
    collected, number = frozenset(), 0
    while matrices.layers:
        matrices.save(folder / CORRELATIONS.format(number))
        collected, number = collected | matrices.layers, number + 1
        matrices = _next_pass(family, model, matrices.waiting, inputs, batch, Correlations(collected, limit))
    tokens.save(folder / TOKENS, {READS: json.dumps(reads.input_of)})
    moments.save(statistics or folder / STATS)  # last: where they are, the rest is too
    return Observed(folder, statistics)


def _next_pass(
    family: ModelFamily,
    model: nn.Module,
    waiting: set[str],
    inputs: dict[str, torch.Tensor],
    batch: int,
    matrices: Correlations,
) -> Correlations:
    """Fill `matrices` with those of the waiting layers that fit; without any, the model is not run."""
    if waiting:
        _watch(family, model, sorted(waiting), inputs, batch, lambda layer, _, x: matrices.observe(layer, x))
    return matrices


class SharedInputs:
    """Finds the layers that are called with one and the same tensor, by the first batch."""

    def __init__(self) -> None:
        self.input_of: dict[str, str] = {}  # layer: the first layer that reads its input
        self._alive: list[tuple[weakref.ref, str]] = []

    def first(self, layer: str, x: torch.Tensor) -> str:
        """The first layer that read this tensor x in this forward call; weak references keep no activation alive."""
        if layer not in self.input_of:
            self._alive = [(reference, name) for reference, name in self._alive if reference() is not None]
            self.input_of[layer] = next((name for reference, name in self._alive if reference() is x), layer)
            if self.input_of[layer] == layer:
                self._alive.append((weakref.ref(x), layer))
        return self.input_of[layer]


@torch.no_grad()
def _watch(
    family: ModelFamily,
    model: nn.Module,
    layers: Iterable[str],
    inputs: dict[str, torch.Tensor],
    batch: int,
    watch: Watch,
    done: Callable[[int], None] = lambda samples: None,
) -> None:
    """Call `watch` with every layer's input at every batch."""
    now = [0.0]

    def hook_of(layer: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, arguments: watch(layer, now[0], arguments[0])

    handles = [model.get_submodule(layer).register_forward_pre_hook(hook_of(layer)) for layer in layers]
    try:
        for part in batches(inputs, batch):
            now[0] = float(part[TIMESTEP][0])
            family.call(model, part)
            done(len(part[TIMESTEP]))
    finally:
        for handle in handles:
            handle.remove()
