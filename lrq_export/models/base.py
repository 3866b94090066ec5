"""What the compiler needs to know of a model family; one file per family implements it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from lrq_export.errors import InputError
from lrq_export.models.latents import Latents

SAMPLES = "samples"  # the first axis of every input


@dataclass(frozen=True)
class InputSpec:
    """Shape of one forward argument: an int is fixed, a string names a free dimension, equal names are equal sizes."""

    shape: tuple[int | str, ...]
    multiple_of: int | dict[str, int] = 1  # of every free dimension but the samples, or of each by its name
    optional: bool = False  # absent means all ones (a mask that masks nothing)
    classes: int | None = None  # labels: whole numbers from 0 to classes - 1; None: any number
    at_most: int | None = None  # what no free dimension but the samples may exceed
    shared: bool = False  # diffusers takes one for all samples, without their axis; of many the first one counts
    between: tuple[float, float] | None = None  # what synthetic values lie between; None: a standard normal

    def __post_init__(self):
        units = self.multiple_of.values() if isinstance(self.multiple_of, dict) else [self.multiple_of]
        if any(unit < 1 for unit in units):
            raise ValueError(f"sizes in multiples of {self.multiple_of}, needed 1 or more")

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.shape))})"

    @property
    def dtype(self) -> torch.dtype:
        """What the torch model takes. Graphs take float32 throughout, which holds every label below 2^24."""
        return torch.float32 if self.classes is None else torch.int64

    def unit(self, dimension: str) -> int:
        """What the size of a free dimension must be a multiple of."""
        if dimension == SAMPLES:
            return 1
        return self.multiple_of if isinstance(self.multiple_of, int) else self.multiple_of.get(dimension, 1)

    def most_units(self, dimension: str) -> int | None:
        """The largest size of a free dimension, in its units; None where there is no limit."""
        limited = self.at_most is not None and dimension != SAMPLES
        return self.at_most // self.unit(dimension) if limited else None

    def check_labels(self, name: str, tensor: torch.Tensor) -> None:
        """Raise InputError for a value that is none of the classes; `name` begins the error. Others hold any number."""
        if self.classes is None:
            return
        values = tensor.double()
        wrong = (values != values.round()) | (values < 0) | (values >= self.classes)
        if not bool(wrong.any()):
            return
        first = tuple(int(index) for index in wrong.nonzero()[0])
        raise InputError(
            f"{name}: got {values[first].item():g} at {list(first)}, "
            f"needed labels: whole numbers from 0 to {self.classes - 1}",
            hint="number the classes as the checkpoint was trained with them",
        )


@dataclass
class Sizes:
    """The sizes of the free dimensions that inputs agree on, each learnt from the first input that has it.

    `where` begins every error, for example the file that holds the inputs; `hint` ends it.
    """

    where: str = ""
    hint: str | None = None
    _known: dict[str, tuple[int, str]] = field(default_factory=dict)  # size and whose it is, by dimension

    def __getitem__(self, dimension: str) -> int:
        return self._known[dimension][0]

    def admit(self, name: str, shape: tuple[int, ...], spec: InputSpec) -> None:
        """Raise InputError unless the input `name` has the shape that `spec` and the inputs before it ask for."""
        if len(shape) != len(spec.shape):
            raise self._refusal(name, shape, spec)
        for size, needed in zip(shape, spec.shape, strict=True):
            if isinstance(needed, int):
                if size != needed:
                    raise self._refusal(name, shape, spec)
                continue
            unit, most = spec.unit(needed), spec.most_units(needed)
            if size < 1 or size % unit:
                raise self._refusal(name, shape, spec, f" with {needed} a positive multiple of {unit}")
            if most is not None and size > most * unit:
                raise self._refusal(name, shape, spec, f" with {needed} at most {most * unit}")
            known, owner = self._known.setdefault(needed, (size, name))
            if size != known:
                raise self._refusal(name, shape, spec, f" with {needed} = {known} as in {owner}")

    def _refusal(self, name: str, shape: tuple[int, ...], spec: InputSpec, condition: str = "") -> InputError:
        return InputError(f"{self.where}{name}: got shape {shape}, needed {spec}{condition}", hint=self.hint)


class ModelFamily(Protocol):
    """A family of diffusers transformers. Everything is derived from the checkpoint's config."""

    class_name: str
    arguments: tuple[str, ...]  # of the model's forward in its order, all but return_dict
    keep: tuple[str, ...]  # shell patterns of linear layers that stay in floating point by default
    scheduler: str  # class name of the diffusers scheduler that draws samples by default

    def construct(self, config: dict[str, Any]) -> nn.Module:
        """The true diffusers model, in eval mode, its parameters on the meta device."""

    def inputs(self, config: dict[str, Any]) -> dict[str, InputSpec]:
        """Forward arguments by name, in graph order. Nested ones are dotted: `added_cond_kwargs.resolution`."""

    def make_traceable(self, model: nn.Module) -> nn.Module:
        """Edit the diffusers model so that it exports with dynamic shapes; same function (parity rung R0)."""

    def call(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the model, diffusers' or traceable, on inputs named as in `inputs`; returns the denoised sample."""

    def head_width(self, model: nn.Module, layer: str) -> int | None:
        """Channels per head if `layer` projects an attention's output, so that its rotation can fold; else None."""

    def shares_attention(self, layer: str) -> bool:
        """Whether `layer` reads only a part of an attention's output, or something else beside it.

        Then its rotation folds only if it is the same for all heads and tokens: Hadamard by head, without signs.
        """

    def latents(self, inputs: Mapping[str, torch.Tensor], conditions: Mapping[str, torch.Tensor]) -> Latents:
        """What the model draws on rows of `conditions`, of the sizes that they and recorded `inputs` have."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Construct modules whose parameters take no memory, while buffers computed in __init__ keep their values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Forward arguments by dotted name: {"a": {"b": t}} becomes {"a.b": t}."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def nest(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Undo the dotted names: {"a.b": t} becomes {"a": {"b": t}}, as the model's forward takes it."""
    nested: dict[str, Any] = {}
    for name, tensor in inputs.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = tensor
        else:
            nested[outer] = tensor
    return nested
