"""The class-conditional DiT: `diffusers.DiTTransformer2DModel` (Peebles & Xie 2023, "Scalable Diffusion Models")."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrq_export.models.base import SAMPLES, InputSpec, parameters_on_meta
from lrq_export.models.latents import Latents
from lrq_export.models.patch_embed import DynamicPatchEmbed


class DiT:
    """The DiT family for the compiler; implements `ModelFamily`."""

    class_name = "DiTTransformer2DModel"
    arguments = ("hidden_states", "timestep", "class_labels", "cross_attention_kwargs")
    # adaLN-Zero, whose scales and gates multiply every channel, and the final projections. Every block has an adaLN and
    # embedders of its own: 36 % of the parameters of DiT-XL/2, but under 1 % of its work, since they see one vector an
    # image and not every token.
    keep = ("transformer_blocks.*.norm1.*", "proj_out_1", "proj_out_2")
    scheduler = "DDIMScheduler"

    def construct(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import DiTTransformer2DModel

        with parameters_on_meta():
            # In training, LabelEmbedding would drop labels at random.
            return DiTTransformer2DModel.from_config(config).eval()

    def inputs(self, config: dict[str, Any]) -> dict[str, InputSpec]:
        # The latents are square: the forward takes their width from the square root of the number of tokens.
        size = config["sample_size"]
        return {
            "hidden_states": InputSpec((SAMPLES, config["in_channels"], size, size)),
            "timestep": InputSpec((SAMPLES,)),
            # The last row of the label table means "no class", for classifier-free guidance.
            "class_labels": InputSpec((SAMPLES,), classes=config["num_embeds_ada_norm"] + 1),
        }

    def call(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = inputs["class_labels"].long()  # float32 in the graph
        return model(**inputs | {"class_labels": labels}, return_dict=False)[0]

    def make_traceable(self, model: nn.Module) -> nn.Module:
        # The original keeps its position embedding in a buffer: a weight that no checkpoint holds.
        model.pos_embed = DynamicPatchEmbed(model.pos_embed)
        return model

    def head_width(self, model: nn.Module, layer: str) -> int | None:
        return model.config.attention_head_dim if layer.endswith(".attn1.to_out.0") else None

    def shares_attention(self, layer: str) -> bool:
        return False

    def latents(self, inputs: Mapping[str, torch.Tensor], conditions: Mapping[str, torch.Tensor]) -> Latents:
        return Latents(inputs["hidden_states"].shape[1:])
