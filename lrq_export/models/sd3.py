"""Stable Diffusion 3 and 3.5: `diffusers.SD3Transformer2DModel` (Esser et al. 2024)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrq_export.models.attention import JointAttention
from lrq_export.models.base import SAMPLES, InputSpec, parameters_on_meta
from lrq_export.models.latents import Latents


class SD3:
    """The SD3 family for the compiler; implements `ModelFamily`."""

    class_name = "SD3Transformer2DModel"
    arguments = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "block_controlnet_hidden_states",
        "joint_attention_kwargs",
    )  # fmt: skip
    # Embedders, the final projection, and every adaLN, which is a layer called `linear` wherever it stands; an adaLN
    # sees one vector an image and not every token. (pos_embed.proj is a convolution and is not a candidate.)
    keep = ("time_text_embed.*", "context_embedder", "*.linear", "proj_out")
    scheduler = "FlowMatchEulerDiscreteScheduler"

    def construct(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        with parameters_on_meta():
            model = SD3Transformer2DModel.from_config(config).eval()
            # Checkpoints hold the table of positions, trained or not, so it is a weight like any other; as a buffer it
            # would keep the numbers that diffusers makes up for a model without a checkpoint.
            table = model.pos_embed._buffers.pop("pos_embed")
            model.pos_embed.pos_embed = nn.Parameter(table, requires_grad=False)
        return model

    def inputs(self, config: dict[str, Any]) -> dict[str, InputSpec]:
        patch = config["patch_size"]
        latent = (SAMPLES, config["in_channels"], "height", "width")
        return {
            "hidden_states": InputSpec(latent, multiple_of=patch, at_most=config["pos_embed_max_size"] * patch),
            "encoder_hidden_states": InputSpec((SAMPLES, "text", config["joint_attention_dim"])),
            "pooled_projections": InputSpec((SAMPLES, config["pooled_projection_dim"])),
            "timestep": InputSpec((SAMPLES,)),
        }

    def call(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs, return_dict=False)[0]

    def make_traceable(self, model: nn.Module) -> nn.Module:
        model.set_attn_processor(JointAttention())
        model.pos_embed = CroppedPatchEmbed(model.pos_embed)
        return model

    def head_width(self, model: nn.Module, layer: str) -> int | None:
        return model.config.attention_head_dim if layer.endswith((".to_out.0", ".to_add_out")) else None

    def shares_attention(self, layer: str) -> bool:
        # Text and image leave one attention; attn2 of dual attention layers is of the image alone.
        return layer.endswith((".attn.to_out.0", ".to_add_out"))

    def latents(self, inputs: Mapping[str, torch.Tensor], conditions: Mapping[str, torch.Tensor]) -> Latents:
        return Latents(inputs["hidden_states"].shape[1:])


class CroppedPatchEmbed(nn.Module):
    """diffusers' PatchEmbed with the middle of its table of positions, cut out for the size at hand.

    The original takes sizes from the latent and divides them; here they are those of the patches, which stay dynamic.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.proj, self.pos_embed, self.side = original.proj, original.pos_embed, original.pos_embed_max_size

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        patches = self.proj(latent)  # (batch, width, rows, columns)
        rows, columns = patches.shape[-2:]
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.pos_embed.unflatten(1, (self.side, self.side))
        position = table[:, top : top + rows, left : left + columns].flatten(1, 2)
        return patches.flatten(2).transpose(1, 2) + position
