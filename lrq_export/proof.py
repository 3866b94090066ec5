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


class Proof:
    """Runs graphs of one model on the same inputs: one recorded sample, and random ones of two other sizes.

    `read` gives source tensors, None random ones. An input that the recording lacks is not given.
    """

    def __init__(self, specs: Mapping[str, InputSpec], recorded: Inputs, read: ReadTensor | None):
        other = other_shapes(specs, recorded, seed=3)
        cases = [{name: tensor[:1] for name, tensor in recorded.items()}, other, other_shapes(specs, other, seed=4)]
        self.cases, self.read = [feeds(specs, case) for case in cases], read
        self.kept = KeptWeights(KEPT_BYTES)  # most passes leave most weights as they are

    def answers(self, traced: TracedGraph) -> Answers:
        """Every output for every case; each weight is evaluated when the slice of the graph that reads it runs.

        Weights of `KEPT_BYTES` in all are kept for the next graph.
        """
        read = self.read or random_source(traced)
        weights = {
            name: functools.partial(self.kept.array, expression, read)
            for name, expression in weight_names(traced).items()
        }
        sliced = SlicedModel(float_model(traced), weights=weights)
        runs = sliced.run([case.__getitem__ for case in self.cases])
        outputs = {(case, name): array for case, name, array in runs}
        self.kept.forget_unasked()
        names = [tensor.name for tensor in traced.graph.outputs]
        return [outputs[index, name] for index in range(len(self.cases)) for name in names]


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
                # About half, one unit more with every free axis: cheap, and neither square nor as given if large.
                unit, most = spec.unit(extent), spec.most_units(extent)
                units = max(2, given.shape[axis] // unit // 2 + len(sizes))
                sizes[extent] = (units if most is None else min(units, most)) * unit
        shape = [sizes[extent] if isinstance(extent, str) else extent for extent in spec.shape]
        if spec.shape == ("samples",):
            made[name] = given[torch.randint(len(given), (sizes["samples"],), generator=generator)]
        elif spec.optional:
            made[name] = torch.ones(shape)
        else:
            made[name] = torch.randn(shape, generator=generator) * given.float().std()
    return made
