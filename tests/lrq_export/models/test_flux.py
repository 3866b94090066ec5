"""FLUX: two streams and one, positions that all samples share, guidance as an input."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import save_file

from lrq_export.calibrate.inputs import load_inputs
from lrq_export.calibrate.record import record
from lrq_export.errors import InputError
from lrq_export.models import family_of
from lrq_export.models.flux import Flux, shift
from lrq_export.runtime import feeds
from lrq_export.verify.metrics import nmse

DOUBLE = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
SINGLE = ("proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v")


def test_the_config_s_class_is_of_this_family():
    assert isinstance(family_of("FluxTransformer2DModel"), Flux)


@pytest.mark.parametrize("sizes", [{}, {"tokens": 64, "text": 1}])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"guidance_embeds": False}, {"num_single_layers": 0}, {"num_layers": 0},
        {"attention_head_dim": 8, "axes_dims_rope": (2, 4, 2), "num_attention_heads": 3},
    ],
)  # fmt: skip
def test_the_traceable_form_is_the_same_function(flux, changes, sizes):
    assert flux.adapter_error(sizes, **changes) < 1e-11


def test_other_frequencies_would_be_seen(flux):
    """Else the test above would show nothing."""
    model, given = flux.new(), flux.inputs()
    wanted = flux.family.call(model, given)
    traceable = flux.family.make_traceable(model)
    traceable.pos_embed.theta /= 2
    assert nmse(flux.family.call(traceable, given), wanted) > 1e-6


def test_both_streams_and_all_of_the_single_blocks_are_quantized(flux, tiny):
    doubles = [f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in DOUBLE]
    singles = [f"single_transformer_blocks.{block}.{layer}" for block in range(2) for layer in SINGLE]
    assert sorted(plan.name for plan in flux.plans(tiny.recipe())) == sorted(doubles + singles)


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        ("transformer_blocks.1.attn.to_out.0", 12), ("transformer_blocks.0.attn.to_add_out", 12),
        ("single_transformer_blocks.1.proj_out", 12), ("proj_out", None), ("transformer_blocks.1.ff.net.2", None),
        ("single_transformer_blocks.0.proj_mlp", None), ("transformer_blocks.1.attn.to_v", None),
    ],
)  # fmt: skip
def test_what_reads_an_attention_s_output_has_heads(flux, layer, width):
    assert flux.family.head_width(flux.new(), layer) == width


def test_guidance_is_an_input_of_the_distilled_models_alone(flux):
    assert "guidance" in flux.specs
    assert "guidance" not in flux.family.inputs(flux.config | {"guidance_embeds": False})


def as_pipelines_give_them(given):
    """Positions without a samples axis."""
    return given | {name: given[name][0] for name in ("img_ids", "txt_ids")}


def test_positions_come_once_for_all_samples_or_once_for_each(flux):
    given = flux.inputs()
    once, each = feeds(flux.specs, as_pipelines_give_them(given)), feeds(flux.specs, given)
    assert once["img_ids"].shape == each["img_ids"].shape == (3, 15, 3)
    assert (once["img_ids"] == each["img_ids"][:1]).all()


@pytest.mark.parametrize(("shape", "text"), [((14, 3), "with tokens = 15"), ((15, 2), "(samples, tokens, 3)")])
def test_positions_of_another_size_are_refused(flux, shape, text):
    with pytest.raises(InputError) as caught:
        feeds(flux.specs, flux.inputs() | {"img_ids": torch.zeros(shape)})
    assert str(caught.value).startswith("img_ids: got shape")
    assert text in str(caught.value)


class Pipeline:
    """Calls its transformer for every prompt as diffusers' FluxPipeline does, two images a prompt."""

    def __init__(self, flux):
        self.transformer, self.given = flux.new(), as_pipelines_give_them(flux.inputs(samples=2))

    def __call__(self, prompts):
        self.transformer(**self.given, joint_attention_kwargs=None, return_dict=False)


def test_what_is_recorded_can_calibrate(flux, tmp_path):
    pipeline = Pipeline(flux)
    record(pipeline, ["a", "b"], tmp_path / "x")
    inputs = load_inputs(tmp_path / "x", flux.specs)
    assert list(inputs) == list(flux.specs)
    assert inputs["img_ids"].shape == (4, 15, 3)
    assert torch.equal(inputs["img_ids"][3], pipeline.given["img_ids"])
    assert flux.family.call(pipeline.transformer, inputs).shape == (4, 15, 4)


def test_synthetic_inputs_are_of_the_range_that_the_model_takes(flux):
    given = flux.inputs(samples=30)
    assert given["timestep"].unique().tolist() == [0, 0.5, 1]
    assert 1 <= given["guidance"].min() < given["guidance"].max() <= 5
    assert not given["txt_ids"].any()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"axes_dims_rope": [4, 4, 6]}, "axes_dims_rope: got [4, 4, 6]"),
        ({"out_channels": 8}, "out_channels: got 8"),
        ({"joint_attention_dim": "wide"}, "joint_attention_dim: got 'wide'"),
    ],
)
def test_a_config_that_does_not_work_is_blamed_on_its_key(flux, tmp_path, changes, part):
    # As diffusers' defaults in what else must fit, for any key to be the only one that is wrong.
    config = flux.settings | {"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
    with pytest.raises(InputError) as caught:
        flux.try_config(tmp_path, config | changes)
    assert part in str(caught.value)


def test_a_recording_without_positions_is_refused(flux, tmp_path):
    given = {name: tensor for name, tensor in flux.inputs().items() if name != "img_ids"}
    save_file(given, tmp_path / "x")
    with pytest.raises(InputError, match="img_ids is missing"):
        load_inputs(tmp_path / "x", flux.specs)


def grid(rows, columns):
    """Positions (1, tokens, 3) as FluxPipeline makes them for an image of so many patches."""
    return FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)[None]


def drawn(positions, channels=8):
    """What is drawn where inputs of another size were recorded."""
    recorded = {"hidden_states": torch.zeros(2, 99, channels)}
    return Flux().latents(recorded, {"img_ids": positions})


def test_as_many_tokens_are_drawn_as_the_conditions_have_positions():
    assert drawn(grid(2, 3)).shape == (6, 8)


def test_pictures_are_the_latents_that_the_pipeline_unpacks():
    image = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    packed = FluxPipeline._pack_latents(image, 3, 2, 4, 6)
    assert drawn(grid(2, 3)).shown == ""
    assert torch.equal(drawn(grid(2, 3)).pictures(packed), image)


NO_GRID = {
    "positions of no grid": (torch.rand(1, 6, 3) * 64, 8),
    "a grid column by column": (grid(3, 2)[..., [0, 2, 1]], 8),
    "a grid with a hole": (torch.cat([grid(2, 3)[:, :5], torch.tensor([[[0.0, 1, 1]]])], dim=1), 8),
    "channels that make no patches": (grid(2, 3), 6),
}


@pytest.mark.parametrize(("positions", "channels"), NO_GRID.values(), ids=NO_GRID.keys())
def test_tokens_without_a_grid_are_shown_as_rows(positions, channels):
    latents = torch.randn(2, 6, channels)
    assert torch.equal(drawn(positions, channels).pictures(latents), latents[:, None])
    assert "Tokens from top to bottom" in drawn(positions, channels).shown


def test_a_timestep_of_a_scheduler_is_a_thousandth_for_the_model():
    arguments = drawn(grid(2, 3)).arguments(
        torch.ones(2, 6, 8), torch.tensor(250.0), {"img_ids": grid(2, 3), "txt_ids": torch.zeros(2, 7, 3)}
    )
    assert arguments["timestep"].tolist() == [0.25, 0.25]
    assert (arguments["img_ids"].shape, arguments["txt_ids"].shape) == ((6, 3), (7, 3))


@pytest.mark.parametrize("tokens", [16, 256, 1000, 4096, 9000])
def test_the_shift_is_the_pipeline_s(tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    assert shift({}, tokens) == pytest.approx(calculate_shift(tokens))
    config = {"base_image_seq_len": 100, "max_image_seq_len": 900, "base_shift": 0.2, "max_shift": 2.0}
    assert shift(config, tokens) == pytest.approx(calculate_shift(tokens, *config.values()))


def test_the_noise_falls_evenly_before_it_is_shifted():
    scheduler = FlowMatchEulerDiscreteScheduler()
    drawn(grid(2, 3)).set_timesteps(scheduler, 4)
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]


def test_other_schedulers_take_steps_alone():
    scheduler = DDIMScheduler()
    drawn(grid(2, 3)).set_timesteps(scheduler, 4)
    assert len(scheduler.timesteps) == 4
