"""PixArt-alpha and PixArt-Sigma: `diffusers.PixArtTransformer2DModel` (Chen et al. 2023, 2024)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrq_export.models.attention import attend
from lrq_export.models.base import SAMPLES, InputSpec, nest, parameters_on_meta
from lrq_export.models.latents import Latents
from lrq_export.models.patch_embed import DynamicPatchEmbed


class PixArt:
    """The PixArt family for the compiler; implements `ModelFamily`."""

    class_name = "PixArtTransformer2DModel"
    arguments = (
        "hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs", "cross_attention_kwargs",
        "attention_mask", "encoder_attention_mask",
    )  # fmt: skip
    # Embedders, adaLN, caption projection and final projection: under 4 % of the parameters of PixArt-XL/2, and the
    # adaLN scales multiply every channel. (pos_embed.proj is a convolution and is not a candidate.)
    keep = ("adaln_single.*", "caption_projection.*", "proj_out")
    scheduler = "DDIMScheduler"

    def construct(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import PixArtTransformer2DModel

        with parameters_on_meta():
            return PixArtTransformer2DModel.from_config(config).eval()

    def inputs(self, config: dict[str, Any]) -> dict[str, InputSpec]:
        latent = (SAMPLES, config["in_channels"], "height", "width")
        specs = {
            "hidden_states": InputSpec(latent, multiple_of=config["patch_size"]),
            "encoder_hidden_states": InputSpec((SAMPLES, "text", config["caption_channels"])),
            "timestep": InputSpec((SAMPLES,)),
            "encoder_attention_mask": InputSpec((SAMPLES, "text"), optional=True),
        }
        if uses_additional_conditions(config):
            specs["added_cond_kwargs.resolution"] = InputSpec((SAMPLES, 2))
            specs["added_cond_kwargs.aspect_ratio"] = InputSpec((SAMPLES, 1))
        return specs

    def call(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**nest(inputs), return_dict=False)[0]

    def make_traceable(self, model: nn.Module) -> nn.Module:
        model.set_attn_processor(BroadcastMaskAttention())
        model.pos_embed = DynamicPatchEmbed(model.pos_embed)
        # The forward squeezes axis 1 of the final projection, which is the tokens: a no-op in torch, an error in ONNX
        # as soon as there is more than one. Give it an axis to squeeze.
        model.proj_out.register_forward_hook(lambda module, arguments, patches: patches.unsqueeze(1))
        return model

    def head_width(self, model: nn.Module, layer: str) -> int | None:
        if layer.endswith((".attn1.to_out.0", ".attn2.to_out.0")):
            return model.config.attention_head_dim
        return None

    def shares_attention(self, layer: str) -> bool:
        return False

    def latents(self, inputs: Mapping[str, torch.Tensor], conditions: Mapping[str, torch.Tensor]) -> Latents:
        return Latents(inputs["hidden_states"].shape[1:])


def uses_additional_conditions(config: dict[str, Any]) -> bool:
    """Resolution and aspect ratio are inputs of the 1024-pixel models (sample_size 128) unless the config says."""
    stated = config.get("use_additional_conditions")
    return config.get("sample_size", 128) == 128 if stated is None else stated


class BroadcastMaskAttention:
    """diffusers' AttnProcessor2_0, with the mask broadcast over heads instead of repeated in memory.

    The repeat (`Attention.prepare_attention_mask`) depends on sizes in a way that the exporter cannot keep dynamic.
    """

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **_
    ) -> torch.Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        bias = None if attention_mask is None else attention_mask[:, None]  # (batch, 1, 1, tokens)
        return attn.to_out[0](attend(query, key, value, attn.heads, bias))
