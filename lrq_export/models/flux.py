"""FLUX.1: `diffusers.FluxTransformer2DModel` (Black Forest Labs 2024)."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lrq_export.models.attention import JointAttention, Rotary, rotary, rotary_frequencies
from lrq_export.models.base import SAMPLES, InputSpec, parameters_on_meta
from lrq_export.models.latents import Latents

TRAINING_STEPS = 1000  # which schedulers count in, while the model takes timesteps from 0 to 1
PATCH = 2  # side of the square of latent pixels that one token holds


class Flux:
    """The FLUX family for the compiler; implements `ModelFamily`."""

    class_name = "FluxTransformer2DModel"
    arguments = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance",
        "joint_attention_kwargs", "controlnet_block_samples", "controlnet_single_block_samples",
    )  # fmt: skip
    # Embedders, the final projection, and every adaLN, which is a layer called `linear` wherever it stands: 27 % of the
    # parameters of FLUX.1-dev, but under 1 % of its work, since an adaLN sees one vector an image and not every token.
    keep = ("time_text_embed.*", "context_embedder", "x_embedder", "*.linear", "proj_out")
    scheduler = "FlowMatchEulerDiscreteScheduler"

    def construct(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        with parameters_on_meta():
            return FluxTransformer2DModel.from_config(config).eval()

    def inputs(self, config: dict[str, Any]) -> dict[str, InputSpec]:
        axes = len(config["axes_dims_rope"])
        specs = {
            "hidden_states": InputSpec((SAMPLES, "tokens", config["in_channels"])),
            "encoder_hidden_states": InputSpec((SAMPLES, "text", config["joint_attention_dim"])),
            "pooled_projections": InputSpec((SAMPLES, config["pooled_projection_dim"])),
            "timestep": InputSpec((SAMPLES,), between=(0, 1)),  # in units of 1000 training steps
            # Position of each token along every axis: (0, row, column) for the image, zeros for the text.
            "img_ids": InputSpec((SAMPLES, "tokens", axes), shared=True, between=(0, 64)),
            "txt_ids": InputSpec((SAMPLES, "text", axes), shared=True, between=(0, 0)),
        }
        if config["guidance_embeds"]:
            specs["guidance"] = InputSpec((SAMPLES,), between=(1, 5))
        return specs

    def call(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs | one_for_all(inputs), return_dict=False)[0]

    def make_traceable(self, model: nn.Module) -> nn.Module:
        model.set_attn_processor(JointAttention())
        model.pos_embed = RotaryPositions(model.pos_embed)
        return model

    def head_width(self, model: nn.Module, layer: str) -> int | None:
        return model.config.attention_head_dim if self.shares_attention(layer) else None

    def shares_attention(self, layer: str) -> bool:
        # Text and image leave one attention; a single block's output projection reads its feed-forward too.
        single = layer.startswith("single_transformer_blocks.") and layer.endswith(".proj_out")
        return single or layer.endswith((".to_out.0", ".to_add_out"))

    def latents(self, inputs: Mapping[str, torch.Tensor], conditions: Mapping[str, torch.Tensor]) -> Latents:
        positions = conditions["img_ids"][0]
        return PackedLatents((len(positions), inputs["hidden_states"].shape[-1]), positions)


def one_for_all(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The positions, which the model takes without an axis of samples: they are the same for all."""
    return {name: inputs[name][0] for name in ("img_ids", "txt_ids")}


@dataclass(frozen=True, eq=False)
class PackedLatents(Latents):
    """Patches of an image as tokens (samples, tokens, channels), drawn as diffusers' FluxPipeline draws them."""

    positions: torch.Tensor  # (tokens, axes), row and column last

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches, row by row, if that is what the positions say."""
        tokens, channels = self.shape
        places = self.positions[:, -2:]
        rows, columns = (int(last) + 1 for last in places.amax(0))
        if rows * columns != tokens or channels % PATCH**2:
            return None
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return (rows, columns) if torch.equal(grid.to(places), places) else None

    @property
    def shown(self) -> str:
        return "" if self.grid else "Tokens from top to bottom, their channels from left to right."

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Noise levels evenly from 1 down to 1 / steps, shifted the more the more tokens there are."""
        options: dict[str, Any] = {}
        if scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = shift(scheduler.config, tokens=self.shape[0])
        levels_given = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if levels_given and not scheduler.config.get("use_flow_sigmas"):
            options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps, **options)

    def timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep / TRAINING_STEPS

    def arguments(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return super().arguments(latents, timestep, conditions) | one_for_all(conditions)

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Patches back in their places; without a grid, a grey picture (n, 1, tokens, channels)."""
        if self.grid is None:
            return latents[:, None]
        patches = latents.unflatten(1, self.grid).unflatten(-1, (-1, PATCH, PATCH))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def shift(config: Mapping[str, Any], tokens: int) -> float:
    """The mu of diffusers' `calculate_shift`: a line through two lengths of sequences, beyond them too."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few) / (many - few)


class RotaryPositions(nn.Module):
    """diffusers' FluxPosEmbed, with angles in float32 and one cosine for each pair of channels."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.theta, self.axis_widths = original.theta, original.axes_dim

    def forward(self, positions: torch.Tensor) -> Rotary:
        """(tokens, axes) positions along every axis; each axis turns channels of its own."""
        frequencies = [rotary_frequencies(width, self.theta) for width in self.axis_widths]
        return rotary(torch.cat([positions[:, i : i + 1] * each for i, each in enumerate(frequencies)], dim=-1))
