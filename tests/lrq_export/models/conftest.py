"""Tiny models of random weights, one a family, with what the tests of every family do with them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from lrq_export import trial
from lrq_export.calibrate.inputs import synthetic_inputs
from lrq_export.models import family_of
from lrq_export.models.base import InputSpec, ModelFamily
from lrq_export.plan import LayerPlan, plan_layers
from lrq_export.verify.reference import adapter_error


@dataclass(frozen=True)
class TinyModel:
    """A config with two blocks of each kind, and sizes of inputs that are all different."""

    class_name: str
    settings: dict[str, Any]
    sizes: dict[str, int]

    @property
    def family(self) -> ModelFamily:
        return family_of(self.class_name)

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.family.construct(self.settings).config)

    @property
    def specs(self) -> dict[str, InputSpec]:
        return self.family.inputs(self.config)

    def new(self, **changes: Any) -> nn.Module:
        """diffusers' own model, its weights and its table of positions wide enough for each to matter."""
        generator = torch.Generator().manual_seed(0)
        model = getattr(diffusers, self.class_name)(**self.settings | changes).eval()
        for name, tensor in model.state_dict().items():
            std = 0.02 if name.endswith("bias") else 0.2
            nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std, generator=generator)
        return model.requires_grad_(False)

    def inputs(self, samples: int = 3, **changes: Any) -> dict[str, torch.Tensor]:
        """Random ones; `changes` are of sizes or of settings."""
        specs = self.family.inputs(dict(self.family.construct(self.settings | changes).config))
        return synthetic_inputs(specs, samples, timesteps=3, seed=1, sizes=self.sizes | changes)

    def adapter_error(self, sizes: dict[str, int], **changes: Any) -> float:
        """Rung R0 of the model with these settings, on inputs of these sizes."""
        return adapter_error(self.family, self.new(**changes), self.inputs(**changes | sizes))

    def try_config(self, folder: Path, config: dict[str, Any]) -> None:
        """As `open_source` does before anything is computed."""
        trial.construct(folder, self.family, config)
        trial.run(folder, self.family, config)

    def plans(self, recipe) -> list[LayerPlan]:
        return plan_layers(self.family.construct(self.settings), self.family, recipe)


PIXART = TinyModel(
    "PixArtTransformer2DModel",
    {
        "sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": 2,
        "attention_head_dim": 12, "num_attention_heads": 2, "cross_attention_dim": 24, "caption_channels": 16,
    },
    {"height": 8, "width": 12, "text": 7},
)  # fmt: skip
DIT = TinyModel(
    "DiTTransformer2DModel",
    {
        "sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 2, "num_layers": 2,
        "attention_head_dim": 12, "num_attention_heads": 2, "num_embeds_ada_norm": 10,
    },
    {},
)  # fmt: skip
FLUX = TinyModel(
    "FluxTransformer2DModel",
    {
        "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 8, "guidance_embeds": True, "axes_dims_rope": (2, 4, 6),
    },
    {"tokens": 15, "text": 7},
)  # fmt: skip
SD3 = TinyModel(
    "SD3Transformer2DModel",
    {
        "sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": 2,
        "attention_head_dim": 12, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 24,
        "pooled_projection_dim": 8, "pos_embed_max_size": 12, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    },
    {"height": 8, "width": 12, "text": 7},
)  # fmt: skip
WAN = TinyModel(
    "WanTransformer3DModel",
    {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 1, "out_channels": 1,
        "text_dim": 16, "freq_dim": 8, "ffn_dim": 48,
    },
    {"frames": 3, "height": 8, "width": 10, "text": 7},
)  # fmt: skip


# Every family for tests that need a few seconds a block: FLUX, whose blocks differ most, has one of each kind.
FAMILIES = {
    "PixArt": PIXART,
    "DiT": DIT,
    "FLUX": replace(FLUX, settings=FLUX.settings | {"num_layers": 1, "num_single_layers": 1}),
    "SD3": replace(SD3, settings=SD3.settings | {"dual_attention_layers": (), "qk_norm": None}),
    "SD3.5": SD3,
    "Wan": WAN,
}


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, TinyModel]:
    """One of every family, by the name of the family."""
    return FAMILIES


@pytest.fixture(scope="session")
def flux() -> TinyModel:
    return FLUX


@pytest.fixture(scope="session")
def sd3() -> TinyModel:
    return SD3


@pytest.fixture(scope="session")
def wan() -> TinyModel:
    return WAN


@pytest.fixture(scope="module", params=[FLUX, SD3, WAN], ids=lambda model: model.class_name)
def each(request) -> TinyModel:
    """All of them in turn."""
    return request.param
