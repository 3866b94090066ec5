"""What calibration saw: moments of every linear layer's input, per timestep, summed as the samples stream by.

Only sums and maxima are kept, in float64, so that statistics of parts merge into those of the whole, in any grouping,
up to float64 rounding; the same calls in the same order give the same bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lrq_export.checkpoint import TensorFile
from lrq_export.errors import InputError
from lrq_export.package import save_tensors_atomic

FORMAT = "lrq-export statistics"
CHUNK_VALUES = 1 << 16  # values widened to float64 at a time: 512 KB stay in the cache, which is four times faster


@dataclass
class Moments:
    """Sums over the tokens of one layer's input x (tokens, cols)."""

    tokens: int
    channel_absmax: torch.Tensor  # (cols,) float32
    channel_sum: torch.Tensor  # (cols,) float64
    channel_square_sum: torch.Tensor  # (cols,) float64
    power_sums: torch.Tensor  # (4,) float64: sums of x, x^2, x^3, x^4 over all values

    @classmethod
    def of(cls, x: torch.Tensor) -> "Moments":
        """Moments of x (tokens, cols)."""
        cols = x.shape[1]
        absmax = torch.zeros(cols)
        sums, squares, powers = (torch.zeros(size, dtype=torch.float64) for size in (cols, cols, 4))
        for chunk in _chunks(x):
            absmax = torch.maximum(absmax, chunk.abs().amax(0).to(torch.float32))
            wide = chunk.to(torch.float64)
            square = wide * wide
            sums += wide.sum(0)
            by_channel = square.sum(0)
            squares += by_channel
            flat, flat_square = wide.view(-1), square.view(-1)
            cube_sum, fourth_sum = torch.dot(flat, flat_square), torch.dot(flat_square, flat_square)
            powers += torch.stack([flat.sum(), by_channel.sum(), cube_sum, fourth_sum])
        return cls(x.shape[0], absmax, sums, squares, powers)

    def copy(self) -> "Moments":
        return Moments(
            self.tokens,
            self.channel_absmax.clone(),
            self.channel_sum.clone(),
            self.channel_square_sum.clone(),
            self.power_sums.clone(),
        )

    def merge(self, other: "Moments") -> "Moments":
        """Take in `other`, in place, and return self. Raises ValueError for another width."""
        if self.cols != other.cols:
            raise ValueError(f"cannot merge moments of {self.cols} and {other.cols} channels")
        self.tokens += other.tokens
        self.channel_absmax = torch.maximum(self.channel_absmax, other.channel_absmax)
        self.channel_sum = self.channel_sum + other.channel_sum
        self.channel_square_sum = self.channel_square_sum + other.channel_square_sum
        self.power_sums = self.power_sums + other.power_sums
        return self

    @property
    def cols(self) -> int:
        return self.channel_absmax.shape[0]

    @property
    def absmax(self) -> float:
        return float(self.channel_absmax.max())

    @property
    def mean(self) -> torch.Tensor:
        """E[x_c] per channel, (cols,) float64; that of the rotated input is this one rotated."""
        return self.channel_sum / self.tokens

    @property
    def second_moment(self) -> torch.Tensor:
        """E[x_c^2] per channel, (cols,) float64."""
        return self.channel_square_sum / self.tokens

    @property
    def rms(self) -> float:
        """J of LRQ-DiT: ||X||_F / sqrt(values)."""
        return (float(self.power_sums[1]) / (self.tokens * self.cols)) ** 0.5

    @property
    def peak_to_rms(self) -> float:
        """absmax / rms; 0 for an input that is zero throughout."""
        return self.absmax / self.rms if self.rms else 0.0

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over the squared variance: 3 for a Gaussian; 1, its least, for a constant input."""
        m1, m2, m3, m4 = (self.power_sums / (self.tokens * self.cols)).tolist()
        variance = m2 - m1**2
        if variance <= 1e-12 * m2:  # nothing but rounding is left of the difference
            return 1.0
        return max(1.0, (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2)


class Statistics:
    """Moments by layer and timestep."""

    def __init__(self) -> None:
        self._moments: dict[str, dict[float, Moments]] = {}

    def observe(self, layer: str, timestep: float, x: torch.Tensor) -> None:
        """Add one input x (..., cols) of a layer.

        Raises InputError when x holds a NaN or an infinity.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        assert rows.shape[0], f"{layer}: an input without tokens"
        moments = Moments.of(rows)
        if not bool(torch.isfinite(moments.power_sums).all()):
            raise InputError(
                f"{layer}: got NaN or Inf in its input at timestep {timestep:g}, needed finite values",
                hint="check the calibration inputs, or load the model in float32 or bfloat16",
            )
        self._add(layer, float(timestep), moments)

    def merge(self, other: "Statistics") -> "Statistics":
        """Take in the statistics of other samples, in place, and return self; `other` stays as it is."""
        for layer, by_timestep in other._moments.items():
            for timestep, moments in by_timestep.items():
                self._add(layer, timestep, moments.copy())
        return self

    def layers(self) -> list[str]:
        return sorted(self._moments)

    def timesteps(self, layer: str) -> list[float]:
        """The timesteps at which a layer was observed, ascending."""
        return sorted(self._moments[layer])

    def at(self, layer: str, timestep: float) -> Moments:
        return self._moments[layer][timestep]

    def layer(self, layer: str) -> Moments:
        """Moments over all timesteps, a copy. Raises KeyError for a layer that was never observed."""
        first, *rest = self.timesteps(layer)
        merged = self.at(layer, first).copy()
        for timestep in rest:
            merged.merge(self.at(layer, timestep))
        return merged

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file: per layer, each field of Moments stacked over its ascending timesteps."""
        tensors: dict[str, torch.Tensor] = {}
        for layer in self.layers():
            tensors |= {f"{layer}/{field}": tensor for field, tensor in self._stacked(layer).items()}
        save_tensors_atomic(path, tensors, {**(metadata or {}), "format": FORMAT})

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what `save` wrote, bit for bit. Raises InputError for any other file."""
        file = TensorFile(path)
        if file.metadata.get("format") != FORMAT:
            raise _not_statistics(path, f"the format {file.metadata.get('format')!r}")
        statistics = cls()
        for layer in sorted({name.rpartition("/")[0] for name in file.entries}):
            fields = {n.rpartition("/")[2]: file.read(n) for n in file.entries if n.rpartition("/")[0] == layer}
            if not _is_stack(fields):
                raise _not_statistics(path, f"fields {sorted(fields)} of layer {layer!r}")
            for index, timestep in enumerate(fields["timesteps"].tolist()):
                statistics._add(layer, timestep, _unstacked(fields, index))
        return statistics

    def _add(self, layer: str, timestep: float, moments: Moments) -> None:
        by_timestep = self._moments.setdefault(layer, {})
        known = by_timestep.get(timestep)
        by_timestep[timestep] = moments if known is None else known.merge(moments)

    def _stacked(self, layer: str) -> dict[str, torch.Tensor]:
        timesteps = self.timesteps(layer)
        each = [self.at(layer, timestep) for timestep in timesteps]
        return {
            "timesteps": torch.tensor(timesteps, dtype=torch.float64),
            "tokens": torch.tensor([moments.tokens for moments in each], dtype=torch.int64),
            "channel_absmax": torch.stack([moments.channel_absmax for moments in each]),
            "channel_sum": torch.stack([moments.channel_sum for moments in each]),
            "channel_square_sum": torch.stack([moments.channel_square_sum for moments in each]),
            "power_sums": torch.stack([moments.power_sums for moments in each]),
        }


# Rank and dtype of every field of a file, after the axis of timesteps.
_FIELDS = {
    "timesteps": (1, torch.float64),
    "tokens": (1, torch.int64),
    "channel_absmax": (2, torch.float32),
    "channel_sum": (2, torch.float64),
    "channel_square_sum": (2, torch.float64),
    "power_sums": (2, torch.float64),
}


def _chunks(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows of x (tokens, cols) at a time, contiguous, on the CPU."""
    for chunk in x.split(max(1, CHUNK_VALUES // x.shape[1])):
        yield chunk.cpu().contiguous()


def _is_stack(fields: Mapping[str, torch.Tensor]) -> bool:
    """Whether the fields of one layer have the names, dtypes and common sizes that `save` gives them."""
    if fields.keys() != _FIELDS.keys():
        return False
    if any((tensor.ndim, tensor.dtype) != _FIELDS[name] for name, tensor in fields.items()):
        return False
    count, cols = fields["channel_absmax"].shape
    widths = {name: 4 if name == "power_sums" else cols for name, (rank, _) in _FIELDS.items() if rank == 2}
    return (
        all(tensor.shape[0] == count for tensor in fields.values())
        and all(fields[name].shape[1] == width for name, width in widths.items())
        and bool((fields["tokens"] > 0).all())
    )


def _unstacked(fields: Mapping[str, torch.Tensor], index: int) -> Moments:
    return Moments(
        tokens=int(fields["tokens"][index]),
        channel_absmax=fields["channel_absmax"][index].clone(),
        channel_sum=fields["channel_sum"][index].clone(),
        channel_square_sum=fields["channel_square_sum"][index].clone(),
        power_sums=fields["power_sums"][index].clone(),
    )


def _not_statistics(path: Path, got: str) -> InputError:
    return InputError(f"{path}: got {got}, needed {FORMAT}", hint="remove it; the build calibrates again")
