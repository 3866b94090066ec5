"""Some tokens of every planned layer's input, to try on it what the layer might be turned into."""

from pathlib import Path

import torch

from lrq_export.calibrate.inputs import priority
from lrq_export.package import save_tensors_atomic

TOKENS = 512  # kept of each input, or one a sample where there are more samples
TIMESTEPS = "/timesteps"  # ending of the tensor that holds each token's timestep


class TokenSample:
    """The same number of tokens from each of `samples` calibration samples, at places spread over its tokens."""

    def __init__(self, samples: int, most: int = TOKENS):
        self._per_sample = max(1, most // samples)
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._timesteps: dict[str, list[float]] = {}

    def observe(self, layer: str, timestep: float, x: torch.Tensor) -> None:
        """Add some of an input x (samples, ..., cols)."""
        for sample in x:
            tokens = sample.reshape(-1, sample.shape[-1])
            places = sorted(sorted(range(len(tokens)), key=priority)[: self._per_sample])
            self._rows.setdefault(layer, []).append(tokens[places].to(torch.float32))
            self._timesteps.setdefault(layer, []).extend([timestep] * len(places))

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        tensors = {layer: torch.cat(rows) for layer, rows in self._rows.items()}
        tensors |= {layer + TIMESTEPS: torch.tensor(times) for layer, times in self._timesteps.items()}
        save_tensors_atomic(path, tensors, metadata)
