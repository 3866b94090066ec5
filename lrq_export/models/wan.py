"""Wan, text to video: `diffusers.WanTransformer3DModel` (Wan Team 2025)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrq_export.errors import InputError
from lrq_export.models.attention import Rotary, attend, rotary, rotary_frequencies, rotate_pairs
from lrq_export.models.base import SAMPLES, InputSpec, parameters_on_meta
from lrq_export.models.latents import Latents

ROTARY_BASE = 10000.0  # theta, which the config does not hold
IMAGE_KEYS = ("image_dim", "added_kv_proj_dim")  # set in the configs of image-to-video models


class Wan:
    """The Wan family for the compiler; implements `ModelFamily`."""

    class_name = "WanTransformer3DModel"
    arguments = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_hidden_states_image",
        "attention_kwargs",
    )
    # Embedders of time and text, and the final projection: under 3 % of the parameters of Wan 14B. What time adds to
    # the channels of every block is a table and no layer. (patch_embedding is a convolution and is not a candidate.)
    keep = ("condition_embedder.*", "proj_out")
    scheduler = "FlowMatchEulerDiscreteScheduler"

    def construct(self, config: dict[str, Any]) -> nn.Module:
        """Raises InputError for an image-to-video model."""
        from diffusers import WanTransformer3DModel

        for key in IMAGE_KEYS:
            if config.get(key) is not None:
                raise InputError(
                    f"{key}: got {config[key]!r}, which image-to-video models have, needed null as text-to-video ones",
                    hint="only text-to-video models of the Wan family are supported so far",
                )
        with parameters_on_meta():
            return WanTransformer3DModel.from_config(config).eval()

    def inputs(self, config: dict[str, Any]) -> dict[str, InputSpec]:
        sides = ("frames", "height", "width")
        patch = dict(zip(sides, config["patch_size"], strict=True))
        return {
            "hidden_states": InputSpec((SAMPLES, config["in_channels"], *sides), multiple_of=patch),
            "timestep": InputSpec((SAMPLES,)),
            "encoder_hidden_states": InputSpec((SAMPLES, "text", config["text_dim"])),
        }

    def call(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs, return_dict=False)[0]

    def make_traceable(self, model: nn.Module) -> nn.Module:
        model.set_attn_processor(RotaryAttention())
        model.rope = RotaryGrid(model.rope)
        return model

    def head_width(self, model: nn.Module, layer: str) -> int | None:
        return model.config.attention_head_dim if layer.endswith(".to_out.0") else None

    def shares_attention(self, layer: str) -> bool:
        return False

    def latents(self, inputs: Mapping[str, torch.Tensor], conditions: Mapping[str, torch.Tensor]) -> Latents:
        return Videos(inputs["hidden_states"].shape[1:])


class Videos(Latents):
    """(samples, channels, frames, height, width)."""

    shown = "The first frame of each video."

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :, 0]


class RotaryAttention:
    """diffusers' WanAttnProcessor without images: self-attention with rotary positions, cross-attention without."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> torch.Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source))
        if rotary_emb is not None:
            heads = [tensor.unflatten(-1, (attn.heads, -1)) for tensor in (query, key)]
            query, key = (rotate_pairs(tensor, rotary_emb).flatten(2) for tensor in heads)
        return attn.to_out[0](attend(query, key, attn.to_v(source), attn.heads))


class RotaryGrid(nn.Module):
    """diffusers' WanRotaryPosEmbed with the angles computed for the size at hand, in float32.

    The original cuts them out of tables in buffers: weights that no checkpoint holds.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.patch = original.patch_size
        self.axis_widths = (original.t_dim, original.h_dim, original.w_dim)

    def forward(self, latent: torch.Tensor) -> Rotary:
        sizes = [size // patch for size, patch in zip(latent.shape[2:], self.patch, strict=True)]
        angles = []
        for axis, (size, width) in enumerate(zip(sizes, self.axis_widths, strict=True)):
            along = torch.arange(size, dtype=torch.float32)[:, None] * rotary_frequencies(width, ROTARY_BASE)
            angles.append(along.reshape([size if i == axis else 1 for i in range(3)] + [-1]).expand(*sizes, -1))
        return rotary(torch.cat(angles, dim=-1).flatten(0, 2))
