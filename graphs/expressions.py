"""Weight expressions: what a weight will be, written down before it is computed.

While the graph is rewritten, a weight is the name of a source tensor and the exact linear maps to apply to it. A pass
that folds a rotation into a weight appends a map; nothing is evaluated until the weights are bound
(`lrq_export.evaluate`). With R = diag(signs / d)·H on blocks of the channel axis, as in `HadamardRotate` (d is 1 but
where channels are equalized, see `graphs.equalizer`):

    x' = x R       =>  W' = W R⁻ᵀ            RotateInput, since x Wᵀ = (x R)(W R⁻ᵀ)ᵀ; R⁻ᵀ is R where d is 1
    y' = y R       =>  W' = Rᵀ W, b' = b R   RotateOutput
    y  = [y1, y2]  =>  W  = [W1; W2]         StackRows

>>> e = Expression("attn.to_v.weight", (8, 4)).then(RotateOutput(block=4))
>>> e.shape
(8, 4)
>>> Expression.from_json(e.to_json()) == e
True
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from graphs.equalizer import divisors


@dataclass(frozen=True)
class Rotation:
    """R = diag(signs / d)·H on each contiguous block of `block` channels; None means no signs, or no divisors d."""

    block: int
    signs_seed: int | None = None
    equalizer: str | None = None  # d as `graphs.equalizer` writes it


@dataclass(frozen=True)
class RotateInput(Rotation):
    """W (rows, cols) becomes W R⁻ᵀ: its input channels arrive rotated."""

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 2:
            raise ValueError(f"RotateInput needs a matrix (rows, cols), got shape {shape}")
        return _blocks_checked(self, shape, axis=1)


@dataclass(frozen=True)
class RotateOutput(Rotation):
    """W (rows, cols) becomes Rᵀ W, a bias (rows,) becomes b R: its output channels leave rotated.

    Only the rows from `start` to `stop` (None: the last) where a part of the channels is rotated.
    """

    start: int = 0
    stop: int | None = None

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        stop = shape[0] if self.stop is None else self.stop
        if not 0 <= self.start < stop <= shape[0]:
            raise ValueError(f"RotateOutput: rows {self.start} to {stop} of {shape[0]}")
        _blocks_checked(self, (stop - self.start, *shape[1:]), axis=0)
        return shape


@dataclass(frozen=True)
class StackRows:
    """Rows of further expressions, in order, below the rows so far: siblings that read one input become one weight."""

    others: tuple["Expression", ...]

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        for other in self.others:
            if other.shape[1:] != shape[1:]:
                raise ValueError(f"StackRows: {other.source} has columns {other.shape[1:]}, needed {shape[1:]}")
        return (shape[0] + sum(other.shape[0] for other in self.others), *shape[1:])


Map = RotateInput | RotateOutput | StackRows
MAPS = {kind.__name__: kind for kind in (RotateInput, RotateOutput, StackRows)}


@dataclass(frozen=True)
class Expression:
    """A source tensor of a stated shape and the maps to apply to it, first to last.

    `source` None stands for zeros: the bias of a linear layer that has none.
    """

    source: str | None
    source_shape: tuple[int, ...]
    maps: tuple[Map, ...] = field(default=())

    def __post_init__(self):
        self.shape  # noqa: B018 - a map that does not fit is refused when it is added, not when it is evaluated

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.source_shape
        for step in self.maps:
            shape = step.output_shape(shape)
        return shape

    def then(self, step: Map) -> "Expression":
        """Return this expression followed by one more map; raises ValueError when the map does not fit the shape.

        Maps of other rows commute, and stand in the order of their rows whatever the order in which they came.
        """
        place = len(self.maps)
        while place and _is_above(step, self.maps[place - 1]):
            place -= 1
        return replace(self, maps=(*self.maps[:place], step, *self.maps[place:]))

    def sources(self) -> list[str]:
        """Names of every source tensor, in order of first use."""
        names = [self.source] if self.source is not None else []
        for step in self.maps:
            if isinstance(step, StackRows):
                names += [name for other in step.others for name in other.sources()]
        return list(dict.fromkeys(names))

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "shape": list(self.source_shape),
            "maps": [_map_to_json(step) for step in self.maps],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Expression":
        return cls(data["source"], tuple(data["shape"]), tuple(_map_from_json(step) for step in data["maps"]))


def _is_above(step: Map, other: Map) -> bool:
    """Whether a map rotates rows that are all above those which the other rotates."""
    both = isinstance(step, RotateOutput) and isinstance(other, RotateOutput)
    return both and step.stop is not None and step.stop <= other.start


def _blocks_checked(rotation: Rotation, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    if rotation.block <= 0 or shape[axis] % rotation.block:
        raise ValueError(f"{type(rotation).__name__}: block {rotation.block} does not divide {shape[axis]} channels")
    if rotation.equalizer is not None and len(divisors(rotation.equalizer)) != shape[axis]:
        found = len(divisors(rotation.equalizer))
        raise ValueError(f"{type(rotation).__name__}: {found} divisors, needed one for each of {shape[axis]} channels")
    return shape


def _map_to_json(step: Map) -> dict[str, Any]:
    if isinstance(step, StackRows):
        return {"map": "StackRows", "others": [other.to_json() for other in step.others]}
    return {"map": type(step).__name__, **asdict(step)}


def _map_from_json(data: dict[str, Any]) -> Map:
    if data["map"] not in MAPS:
        raise ValueError(f"unknown map {data['map']!r}, needed one of {', '.join(MAPS)}")
    if data["map"] == "StackRows":
        return StackRows(tuple(Expression.from_json(other) for other in data["others"]))
    return MAPS[data["map"]](**{key: value for key, value in data.items() if key != "map"})
