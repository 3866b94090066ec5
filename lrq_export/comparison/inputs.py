"""One input of the model and the linear layers that read it: what a treatment decides on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lrq_export.calibrate.observed import Observed


@dataclass(frozen=True)
class LayerInput:
    """What calibration saw of it, in the basis of the model; read when asked for, so that a large model fits."""

    layers: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    head_width: int | None  # channels per head if the input is an attention's output
    observed: Observed

    @property
    def width(self) -> int:
        return self.linears[0].in_features

    @property
    def weights(self) -> list[torch.Tensor]:
        """Each float32 (rows, cols)."""
        return [linear.weight.detach().float() for linear in self.linears]

    @property
    def tokens(self) -> torch.Tensor:
        """float32 (tokens, cols)."""
        return self.observed.tokens(self.layers[0])

    @property
    def token_timesteps(self) -> torch.Tensor:
        """float32 (tokens,)."""
        return self.observed.timesteps(self.layers[0])

    @property
    def correlation(self) -> torch.Tensor:
        """E[x xᵀ] float32 (cols, cols)."""
        return self.observed.correlation(self.layers[0])

    @property
    def mean(self) -> torch.Tensor:
        """E[x] float64 (cols,)."""
        return self.observed.statistics.layer(self.layers[0]).mean

    @property
    def rms(self) -> float:
        """J of LRQ-DiT, over all calibration tokens."""
        return self.observed.statistics.layer(self.layers[0]).rms

    @property
    def absmax_by_timestep(self) -> torch.Tensor:
        """Largest magnitude of each channel at each observed timestep, float32 (timesteps, cols)."""
        statistics, layer = self.observed.statistics, self.layers[0]
        return torch.stack([statistics.at(layer, t).channel_absmax for t in statistics.timesteps(layer)])
