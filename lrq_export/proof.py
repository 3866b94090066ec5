"""Translation validation: does a rewritten graph compute what it computed before? (Pnueli, Siegel and Singerman 1998)

No pass is trusted. Both graphs are run in floating point (`graphs.float_model`), their weight expressions evaluated, on
the same inputs of several sizes; what they answer may differ by rounding only. The weights are the checkpoint's, or
random ones of the same shapes, which show a wrong rewrite as well and need no checkpoint.
"""

import functools
import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch

from graphs.float_model import float_model, weight_names
from graphs.traced import TracedGraph
from lrq_export.evaluate import KeptWeights, ReadTensor
from lrq_export.models.base import InputSpec
from lrq_export.runtime import feeds
from lrq_export.verify.metrics import nmse
from lrq_export.verify.sliced import SlicedModel

KEPT_BYTES = 5 << 29  # all of PixArt-XL/2, and a part of larger models
Inputs = dict[str, torch.Tensor]
Answers = list[np.ndarray]
# A rewrite may move answers so many times as much (NMSE) as other last bits of the inputs do: docs/graph.md.
MARGIN = 1e3
LEAST_BOUND = 1e-10  # where inputs hardly reach the answers


class Proof:
    """Runs graphs of one model on the same inputs: one recorded sample, and random ones of two other sizes.

    `read` gives source tensors, None random ones. The recorded sample lacks what the recording lacks; the others have
    optional inputs, masks, of zeros and ones.
    """

    def __init__(self, specs: Mapping[str, InputSpec], recorded: Inputs, read: ReadTensor | None):
        other = other_shapes(specs, recorded, seed=3)
        cases = [{name: tensor[:1] for name, tensor in recorded.items()}, other, other_shapes(specs, other, seed=4)]
        self.cases, self.read = [feeds(specs, case) for case in cases], read
        self.dense = [name for name, spec in specs.items() if is_dense(spec)]
        self.kept = KeptWeights(KEPT_BYTES)  # most passes leave most weights as they are

    def answers(self, traced: TracedGraph) -> Answers:
        """Every output for every case."""
        return self._run(traced, self.cases)

    def bound(self, traced: TracedGraph, answers: Answers) -> float:
        """The most NMSE that a right rewrite of a graph shows, which answers this: `MARGIN` times its own rounding.

        That is what its answers move by where latents and text are given other last bits. Timesteps stay: a sinusoid
        of a thousand blows up a last bit.
        """
        rng, moved = np.random.default_rng(0), []
        for case in self.cases:
            noise = {name: rng.uniform(-1, 1, case[name].shape) * np.finfo(np.float32).eps for name in self.dense}
            moved.append(case | {name: (case[name] * (1 + noise[name])).astype(np.float32) for name in self.dense})
        return max(LEAST_BOUND, MARGIN * difference(self._run(traced, moved), answers))

    def _run(self, traced: TracedGraph, cases: list[dict[str, np.ndarray]]) -> Answers:
        """Each weight is evaluated when the slice of the graph that reads it runs.

        Weights of `KEPT_BYTES` in all are kept for the next graph.
        """
        read = self.read or random_source(traced)
        weights = {
            name: functools.partial(self.kept.array, expression, read)
            for name, expression in weight_names(traced).items()
        }
        sliced = SlicedModel(float_model(traced), weights=weights)
        runs = sliced.run([case.__getitem__ for case in cases])
        outputs = {(case, name): array for case, name, array in runs}
        self.kept.forget_unasked()
        names = [tensor.name for tensor in traced.graph.outputs]
        return [outputs[index, name] for index in range(len(cases)) for name in names]


def difference(after: Answers, before: Answers) -> float:
    """The largest NMSE over all cases."""
    return max(nmse(now, was) for now, was in zip(after, before, strict=True))


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


def is_dense(spec: InputSpec) -> bool:
    """Whether an input is latents or text: no timestep, label, mask, size or position, last bits of which count."""
    return len(spec.shape) > 2 and spec.between is None


def other_shapes(specs: dict[str, InputSpec], inputs: Inputs, seed: int) -> Inputs:
    """Random inputs of another batch, height, width and text length than the given ones, one timestep each.

    Optional inputs are masks, also where none is given: zeros and ones, and the first of each row a one.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {"samples": 3}
    made = {}
    for name, spec in specs.items():
        given = inputs.get(name)
        if spec.optional and all(isinstance(extent, int) or extent in sizes for extent in spec.shape):
            shape = [sizes.get(extent, extent) for extent in spec.shape]
            made[name] = (torch.rand(shape, generator=generator) < 0.5).float()
            made[name][..., 0] = 1
        if given is None or spec.optional:
            continue
        for axis, extent in enumerate(spec.shape):
            if isinstance(extent, str) and extent not in sizes:
                # About half, one unit more with every free axis: cheap, and neither square nor as given if large.
                unit, most = spec.unit(extent), spec.most_units(extent)
                units = max(2, given.shape[axis] // unit // 2 + len(sizes))
                sizes[extent] = (units if most is None else min(units, most)) * unit
        shape = [sizes[extent] if isinstance(extent, str) else extent for extent in spec.shape]
        if spec.shape == ("samples",):
            made[name] = given[torch.randint(len(given), (sizes["samples"],), generator=generator)]
        else:
            made[name] = torch.randn(shape, generator=generator) * given.float().std()
    return made
