"""The sizes that an engine is built for, as a recipe writes them, for every input of the graph.

A profile names free axes of the model and the least, usual and largest size of each; an axis that it does not name has
the size of the recorded inputs, and the samples go from one to four times that:

>>> from lrq_export.models.base import InputSpec
>>> specs = {"hidden_states": InputSpec(("samples", 4, "height", "width")), "timestep": InputSpec(("samples",))}
>>> ranges = parse_profile("samples=1:2:8 height=32:64:64", {"samples": 2, "height": 64, "width": 64}, specs)
>>> ranges["height"], ranges["width"]
(Range(least=32, usual=64, most=64), Range(least=64, usual=64, most=64))
>>> shapes_of(ranges, specs)["hidden_states"]
[(1, 4, 32, 64), (2, 4, 64, 64), (8, 4, 64, 64)]
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from lrq_export.errors import UsageError
from lrq_export.models.base import SAMPLES, InputSpec

KEY = "engine.profiles"
MOST = 2**31 - 1  # of TensorRT's axes


class Range(NamedTuple):
    """Sizes of one axis."""

    least: int
    usual: int
    most: int


def recorded_sizes(specs: Mapping[str, InputSpec], inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The size of every free axis in recorded inputs; a call takes one sample of them."""
    sizes = {SAMPLES: 1}
    for name, spec in specs.items():
        for axis, extent in enumerate(spec.shape):
            if isinstance(extent, str) and extent != SAMPLES and name in inputs:
                sizes.setdefault(extent, int(inputs[name].shape[axis]))
    return sizes


def parse_profile(text: str, recorded: Mapping[str, int], specs: Mapping[str, InputSpec]) -> dict[str, Range]:
    """The range of every free axis. Raises UsageError for an unknown axis, sizes out of order, or ones that do not fit.

    `text` is a profile such as "samples=1:2:8 height=64"; "" takes all sizes from `recorded`.
    """
    given: dict[str, Range] = {}
    for part in text.split():
        axis, sizes = _range(part, recorded)
        if axis in given:
            raise UsageError(f"{KEY}: got {axis} twice in {text!r}, needed it once")
        given[axis] = sizes
    default = {SAMPLES: Range(1, recorded[SAMPLES], 4 * recorded[SAMPLES])}
    ranges = {axis: given.get(axis, default.get(axis, Range(size, size, size))) for axis, size in recorded.items()}
    for spec in specs.values():
        for axis in {extent for extent in spec.shape if isinstance(extent, str)}:
            _check_fits(axis, ranges[axis], spec)
    return ranges


def shapes_of(ranges: Mapping[str, Range], specs: Mapping[str, InputSpec]) -> dict[str, list[tuple[int, ...]]]:
    """The least, usual and largest shape of every input."""
    return {
        name: [
            tuple(getattr(ranges[extent], which) if isinstance(extent, str) else extent for extent in spec.shape)
            for which in Range._fields
        ]
        for name, spec in specs.items()
    }


def _range(part: str, known: Mapping[str, int]) -> tuple[str, Range]:
    """ "height=32:64:64" or "height=64"."""
    axis, equals, sizes = part.partition("=")
    if axis not in known:
        raise UsageError(f"{KEY}: got {part!r}, needed an axis of this model: {', '.join(known)}")
    numbers = sizes.split(":")
    if not equals or len(numbers) not in (1, 3) or not all(number.isdecimal() for number in numbers):
        raise UsageError(f"{KEY}: got {part!r}, needed AXIS=SIZE or AXIS=LEAST:USUAL:LARGEST")
    found = Range(*map(int, numbers * 3 if len(numbers) == 1 else numbers))
    if not 1 <= found.least <= found.usual <= found.most <= MOST:
        raise UsageError(f"{KEY}: got {part!r}, needed sizes from 1 to {MOST}, in ascending order")
    return axis, found


def _check_fits(axis: str, sizes: Range, spec: InputSpec) -> None:
    unit, most = spec.unit(axis), spec.most_units(axis)
    for size in sizes:
        if size % unit:
            raise UsageError(f"{KEY}: {axis} is {size}, needed a multiple of {unit}")
        if most is not None and size > most * unit:
            raise UsageError(f"{KEY}: {axis} is {size}, needed at most {most * unit}")
