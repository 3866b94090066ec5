"""Wan: videos, with positions along three axes and text in attentions of its own."""

import pytest
import torch

from lrq_export.errors import InputError
from lrq_export.models import family_of
from lrq_export.models.wan import Wan
from lrq_export.runtime import feeds
from lrq_export.verify.metrics import nmse

QUANTIZED = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
    "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
)  # fmt: skip


def test_the_config_s_class_is_of_this_family():
    assert isinstance(family_of("WanTransformer3DModel"), Wan)


@pytest.mark.parametrize("sizes", [{}, {"frames": 1, "height": 12, "width": 4, "text": 1}, {"frames": 8}])
@pytest.mark.parametrize(
    "changes",
    [{}, {"cross_attn_norm": False}, {"attention_head_dim": 8, "num_attention_heads": 3}, {"freq_dim": 6}],
)
def test_the_traceable_form_is_the_same_function(wan, changes, sizes):
    assert wan.adapter_error(sizes, **changes) < 1e-11


def test_patches_may_span_frames(wan):
    assert wan.adapter_error({"frames": 4, "width": 9}, patch_size=(2, 2, 3)) < 1e-11


def test_positions_along_other_axes_would_be_seen(wan):
    """Else the tests above would show nothing."""
    model, given = wan.new(), wan.inputs()
    wanted = wan.family.call(model, given)
    traceable = wan.family.make_traceable(model)
    traceable.rope.axis_widths = (6, 4, 2)
    assert nmse(wan.family.call(traceable, given), wanted) > 1e-6


def test_all_that_a_block_computes_on_tokens_is_quantized(wan, tiny):
    wanted = [f"blocks.{block}.{layer}" for block in range(2) for layer in QUANTIZED]
    assert [plan.name for plan in wan.plans(tiny.recipe())] == wanted


@pytest.mark.parametrize(
    ("layer", "width"), [("attn1.to_out.0", 12), ("attn2.to_out.0", 12), ("attn1.to_v", None), ("ffn.net.2", None)]
)
def test_what_reads_an_attention_s_output_has_heads(wan, layer, width):
    assert wan.family.head_width(wan.new(), f"blocks.1.{layer}") == width


def test_frames_and_sides_have_patches_of_their_own(wan):
    assert feeds(wan.specs, wan.inputs(frames=5))["hidden_states"].shape == (3, 1, 5, 8, 10)
    with pytest.raises(InputError) as caught:
        feeds(wan.specs, wan.inputs() | {"hidden_states": torch.ones(3, 1, 5, 8, 9)})
    assert "with width a positive multiple of 2" in str(caught.value)


def test_a_video_is_drawn_whole_and_shown_by_its_first_frame():
    recorded = {"hidden_states": torch.randn(5, 2, 3, 8, 10)}
    drawn = Wan().latents(recorded, {})
    assert drawn.shape == (2, 3, 8, 10)
    assert torch.equal(drawn.pictures(recorded["hidden_states"]), recorded["hidden_states"][:, :, 0])


@pytest.mark.parametrize("key", ["image_dim", "added_kv_proj_dim"])
def test_an_image_to_video_model_is_refused(wan, tmp_path, key):
    config = wan.settings | {key: 24}
    with pytest.raises(InputError) as caught:
        wan.try_config(tmp_path, config)
    assert f"{key}: got" in str(caught.value)
    assert "which image-to-video models have" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"out_channels": 3}, "out_channels: got 3"), ({"in_channels": 36}, "in_channels: got 36"),
     ({"patch_size": [2, 2]}, "patch_size: got [2, 2]")],
)  # fmt: skip
def test_a_config_that_does_not_work_is_blamed_on_its_key(wan, tmp_path, changes, part):
    config = wan.settings | {"in_channels": 16, "out_channels": 16}
    with pytest.raises(InputError) as caught:
        wan.try_config(tmp_path, config | changes)
    assert part in str(caught.value)
