"""What the model families draw: the latents of a trajectory, and the pictures that a report shows of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Latents:
    """Images (samples, channels, height, width), of a model that takes the timesteps of a scheduler as they are."""

    shape: tuple[int, ...]  # of one sample

    @property
    def shown(self) -> str:
        """What the pictures leave out or change, in a sentence; empty if nothing."""
        return ""

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Prepare a diffusers scheduler as the family's pipeline does."""
        scheduler.set_timesteps(steps)

    def timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        """What the model takes for timesteps of a scheduler."""
        return timestep

    def arguments(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The forward's arguments, by dotted name, to denoise `latents` (n, ...) at one timestep of a scheduler."""
        return {"hidden_states": latents, "timestep": self.timestep(timestep).expand(len(latents)), **conditions}

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, ...) as (n, channels, height, width)."""
        return latents
