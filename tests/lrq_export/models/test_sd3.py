"""Stable Diffusion 3 and 3.5: a table of positions in the checkpoint, blocks of one attention or two."""

import pytest
import torch

from lrq_export.calibrate.inputs import synthetic_inputs
from lrq_export.errors import InputError
from lrq_export.models import family_of
from lrq_export.models.sd3 import SD3
from lrq_export.runtime import feeds
from lrq_export.source import open_source
from lrq_export.verify.metrics import nmse

JOINT = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
)
SECOND = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
TEXT = ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")  # which the last block drops


def test_the_config_s_class_is_of_this_family():
    assert isinstance(family_of("SD3Transformer2DModel"), SD3)


@pytest.mark.parametrize("sizes", [{}, {"height": 24, "width": 2, "text": 1}, {"height": 6, "width": 10, "text": 9}])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"dual_attention_layers": (), "qk_norm": None}, {"dual_attention_layers": (0, 1)},
        {"attention_head_dim": 8, "num_attention_heads": 3}, {"patch_size": 1, "pos_embed_max_size": 25},
    ],
)  # fmt: skip
def test_the_traceable_form_is_the_same_function(sd3, changes, sizes):
    assert sd3.adapter_error(sizes, **changes) < 1e-11


def test_another_table_of_positions_would_be_seen(sd3):
    """Else the test above would show nothing."""
    model, given = sd3.new(), sd3.inputs()
    wanted = sd3.family.call(model, given)
    traceable = sd3.family.make_traceable(model)
    traceable.pos_embed.pos_embed = traceable.pos_embed.pos_embed.roll(1, dims=1)
    assert nmse(sd3.family.call(traceable, given), wanted) > 1e-6


def test_both_streams_are_quantized_as_far_as_they_go(sd3, tiny):
    first = [f"transformer_blocks.0.{layer}" for layer in JOINT + SECOND + FEED_FORWARD + TEXT]
    last = [f"transformer_blocks.1.{layer}" for layer in JOINT + FEED_FORWARD]
    assert sorted(plan.name for plan in sd3.plans(tiny.recipe())) == sorted(first + last)


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        ("attn.to_out.0", 12), ("attn2.to_out.0", 12), ("attn.to_add_out", 12), ("attn.to_v", None),
        ("ff.net.2", None), ("ff_context.net.2", None),
    ],
)  # fmt: skip
def test_what_reads_an_attention_s_output_has_heads(sd3, layer, width):
    assert sd3.family.head_width(sd3.new(), f"transformer_blocks.0.{layer}") == width


def test_the_positions_are_those_of_the_checkpoint(sd3, tmp_path):
    original = sd3.new()
    original.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    given = sd3.inputs()
    loaded = source.load(source.model())
    assert torch.equal(loaded.pos_embed.pos_embed, original.pos_embed.pos_embed)
    assert torch.equal(sd3.family.call(loaded, given), sd3.family.call(original, given))


def test_latents_larger_than_the_table_are_refused(sd3):
    assert feeds(sd3.specs, sd3.inputs(height=24))["hidden_states"].shape == (3, 1, 24, 12)
    with pytest.raises(InputError) as caught:
        feeds(sd3.specs, sd3.inputs(height=26))
    assert str(caught.value).startswith("hidden_states: got shape (3, 1, 26, 12)")
    assert "with height at most 24" in str(caught.value)


def test_synthetic_latents_fit_the_table(sd3):
    assert synthetic_inputs(sd3.specs, 2, 2, seed=0)["hidden_states"].shape == (2, 1, 24, 24)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"pos_embed_max_size": None}, "pos_embed_max_size: got None"),
        ({"pos_embed_max_size": 2}, "pos_embed_max_size: got 2"),
        ({"caption_projection_dim": 20}, "caption_projection_dim: got 20"),
        ({"qk_norm": "sharp"}, "qk_norm: got 'sharp'"),
    ],
)
def test_a_config_that_does_not_work_is_blamed_on_its_key(sd3, tmp_path, changes, part):
    # As diffusers' defaults in what else must fit, for any key to be the only one that is wrong.
    config = sd3.settings | {"num_attention_heads": 18, "attention_head_dim": 64, "caption_projection_dim": 1152}
    with pytest.raises(InputError) as caught:
        sd3.try_config(tmp_path, config | changes)
    assert part in str(caught.value)
