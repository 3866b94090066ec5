"""Evaluate weight expressions (`graphs.expressions`) in torch."""

from collections.abc import Callable

import numpy as np
import torch

from graphs import expressions
from graphs.expressions import Expression, RotateInput, RotateOutput, StackRows
from lrq_export.errors import InputError
from lrq_export.quant.rotation import PartialRotation, Rotation

ReadTensor = Callable[[str], torch.Tensor]


def evaluate(expression: Expression, read: ReadTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The tensor that `expression` stands for, in `dtype` (float32 or float64), shape `expression.shape`.

    `read` returns a source tensor by name. Raises InputError when a source's shape is not the one written down.
    """
    value = _source(expression, read, dtype)
    for step in expression.maps:
        if isinstance(step, StackRows):
            value = torch.cat([value, *(evaluate(other, read, dtype) for other in step.others)])
        elif isinstance(step, RotateInput):
            value = rotation_of(step, value.shape[1]).apply_to_weight(value)
        elif isinstance(step, RotateOutput):
            rotation = rotation_of(step, len(value))
            value = rotation.apply(value.movedim(0, -1).contiguous()).movedim(-1, 0).contiguous()
        else:
            raise TypeError(f"no evaluation is defined for the map {type(step).__name__}")
    return value


class KeptWeights:
    """Evaluates expressions in float32, and keeps what fits into `limit` bytes for when they are asked for again.

    What is asked for in the same order again and again finds as large a part of it kept as fits.
    """

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._kept: dict[Expression, np.ndarray] = {}
        self._asked: set[Expression] = set()

    def array(self, expression: Expression, read: ReadTensor) -> np.ndarray:
        """As `evaluate`; not to be written to."""
        self._asked.add(expression)
        if expression in self._kept:
            return self._kept[expression]
        array = evaluate(expression, read).numpy()
        if self.held + array.nbytes <= self.limit:
            self._kept[expression] = array
            self.held += array.nbytes
        return array

    def forget_unasked(self) -> None:
        """Let go of what was not asked for since the last call."""
        for expression in self._kept.keys() - self._asked:
            self.held -= self._kept.pop(expression).nbytes
        self._asked.clear()


def rotation_of(step: expressions.Rotation, width: int) -> Rotation | PartialRotation:
    """The torch rotation of `width` channels that a map names."""
    if not isinstance(step, RotateOutput) or (step.start, step.stop or width) == (0, width):
        return Rotation(width, step.block, step.signs_seed, step.equalizer)
    part = Rotation((step.stop or width) - step.start, step.block, step.signs_seed, step.equalizer)
    return PartialRotation(width, step.start, part)


def _source(expression: Expression, read: ReadTensor, dtype: torch.dtype) -> torch.Tensor:
    if expression.source is None:
        return torch.zeros(expression.source_shape, dtype=dtype)
    value = read(expression.source)
    if tuple(value.shape) != expression.source_shape:
        raise InputError(
            f"{expression.source}: got shape {tuple(value.shape)}, needed {expression.source_shape}",
            hint="the config.json and the weights belong to different models",
        )
    return value.to(dtype)
