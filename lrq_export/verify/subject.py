"""What a climb of the ladder is about: a package, what it was built from, and the inputs to compare on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lrq_export.models.base import InputSpec, ModelFamily
from lrq_export.proof import other_shapes
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Recipe
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.source import Source
from lrq_export.verify import forced, ladder
from lrq_export.verify.reference import Reference

PARITY_SAMPLES = 3


@dataclass
class Subject:
    """What the rungs share. `source` is None when only the package's files are at hand."""

    package: Path
    recipe: Recipe
    family: ModelFamily
    config: dict[str, Any]
    source: Source | None
    quantized: QuantizedFile
    reference: Reference
    samples: int = PARITY_SAMPLES  # of the evaluation inputs, that parity is measured on

    @property
    def specs(self) -> dict[str, InputSpec]:
        return self.family.inputs(self.config)

    @property
    def few(self) -> ladder.Inputs:
        """A handful of evaluation inputs, spread over the timesteps."""
        count = len(self.reference.inputs["hidden_states"])
        rows = np.linspace(0, count - 1, min(self.samples, count)).round().astype(int)
        return {name: tensor[rows] for name, tensor in self.reference.inputs.items()}

    @property
    def cases(self) -> list[ladder.Inputs]:
        """The recorded inputs, and random ones of another batch, size and text length."""
        return [self.few, other_shapes(self.specs, self.reference.inputs, seed=2)]

    @cached_property
    def tensor_of(self) -> dict[str, str]:
        """For every quantized layer the tensor of model.onnx that it reads; the engine keeps these names."""
        return forced.layer_inputs(rewritten_graph(self.package))


def quantized_model(family: ModelFamily, config: dict[str, Any], quantized: QuantizedFile) -> nn.Module:
    """The diffusers model with every quantized layer replaced by one that computes with exactly the package's codes."""
    model = family.construct(config)
    for layer in quantized.records:
        model.set_submodule(layer, quantized.module(layer))
    for name in quantized.float_names():
        owner, _, leaf = name.rpartition(".")
        if owner in quantized.records:
            continue  # the bias of a quantized layer, which owns it
        parameter = nn.Parameter(quantized.read(name).clone(), requires_grad=False)
        model.get_submodule(owner)._parameters[leaf] = parameter
    return model
