"""FLUX.1: `diffusers.FluxTransformer2DModel` (Black Forest Labs 2024)."""

from typing import Any

import torch
from torch import nn

from lrq_export.models.attention import JointAttention, Rotary, rotary, rotary_frequencies
from lrq_export.models.base import SAMPLES, InputSpec, parameters_on_meta


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
        positions = {name: inputs[name][0] for name in ("img_ids", "txt_ids")}  # the same for all samples
        return model(**inputs | positions, return_dict=False)[0]

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


class RotaryPositions(nn.Module):
    """diffusers' FluxPosEmbed, with angles in float32 and one cosine for each pair of channels."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.theta, self.axis_widths = original.theta, original.axes_dim

    def forward(self, positions: torch.Tensor) -> Rotary:
        """(tokens, axes) positions along every axis; each axis turns channels of its own."""
        frequencies = [rotary_frequencies(width, self.theta) for width in self.axis_widths]
        return rotary(torch.cat([positions[:, i : i + 1] * each for i, each in enumerate(frequencies)], dim=-1))
