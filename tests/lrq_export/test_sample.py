"""Samples: through the command line, and the sampler itself against a scheduler stepped by hand."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from lrq_export.errors import UsageError
from lrq_export.sample import write_contact_sheet
from lrq_export.sampling import ConditionalSampler, scheduler_from


def test_sample_writes_a_png(package, cli, tmp_path):
    outcome = cli("sample", package, "-o", tmp_path / "s.png")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{tmp_path / 's.png'}\n", "")
    with Image.open(tmp_path / "s.png") as image:
        assert image.format == "PNG"
        assert image.size == (2 * 96, 96)  # the recipe's two images, enlarged


def test_sample_writes_latents_that_depend_on_the_seed_and_rows_alone(package, cli, tmp_path):
    def draw(name, *flags):
        assert cli("sample", package, "-o", tmp_path / name, "--steps", "2", *flags).code == 0
        return load_file(tmp_path / name)["samples"]

    first = draw("a.safetensors", "--rows", "3,1", "--seed", "4")
    assert first.shape == (2, 1, 8, 8)
    assert torch.equal(first, draw("b.safetensors", "--rows", "3,1", "--seed", "4"))
    assert not torch.equal(first, draw("c.safetensors", "--rows", "3,1", "--seed", "5"))
    assert not torch.equal(first[0], draw("d.safetensors", "--rows", "0,1", "--seed", "4")[0])
    assert draw("e.safetensors", "--images", "5").shape[0] == 5  # more than there are rows: taken in turn


def test_samples_of_a_build_are_drawn_again(package, cli, tmp_path):
    """The recipe's seed, steps and rows give the trajectory that R5 judged."""
    report_rows = load_file(package / "reference.safetensors")["latents"][-1]
    assert cli("sample", package, "-o", tmp_path / "s.safetensors").code == 0
    drawn = load_file(tmp_path / "s.safetensors")["samples"]
    assert drawn.shape == report_rows.shape
    assert float((drawn - report_rows).square().sum() / report_rows.square().sum()) < 0.5


WRONG = {
    "rows that are no numbers": (("--rows", "1,b"), "'1,b'"),
    "a row that is not there": (("--rows", "0,4"), "0 to 3"),
    "a negative row": (("--rows", "-1"), "0 to 3"),
    "a pipeline without prompts": (("--pipeline", "."), "--prompts"),
    "prompts without a pipeline": (("--prompts", "x.txt"), "--pipeline"),
}


@pytest.mark.parametrize(("flags", "part"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_flag_is_refused(package, cli, tmp_path, flags, part):
    cli("sample", package, "-o", tmp_path / "s.png", *flags).refused(2, part)
    assert list(tmp_path.iterdir()) == []


def test_what_a_pipeline_draws_is_no_latents(package, cli, tmp_path):
    outcome = cli("sample", package, "-o", tmp_path / "s.safetensors", "--pipeline", tmp_path, "--prompts", tmp_path)
    outcome.refused(2, "s.safetensors", "ends in .png")


class Halving:
    """A transformer that predicts half its input plus its text's mean, and remembers its calls."""

    config = type("Config", (), {"in_channels": 1, "sample_size": 4})

    def __init__(self, channels=1):
        self.calls, self.channels = [], channels

    def __call__(self, hidden_states, encoder_hidden_states, timestep, return_dict=True):
        assert return_dict is False
        self.calls.append((hidden_states, encoder_hidden_states, timestep))
        noise = hidden_states / 2 + encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        return (noise.repeat(1, self.channels, 1, 1),)


CONDITIONS = {"encoder_hidden_states": torch.arange(12.0).reshape(3, 2, 2)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_sampler_is_the_schedulers_loop():
    scheduler = DDIMScheduler(clip_sample=False)
    got = ConditionalSampler(Halving(), scheduler, CONDITIONS)([2, 0], num_inference_steps=3, generator=seeded())
    latents = torch.randn(2, 1, 4, 4, generator=seeded())
    mean = CONDITIONS["encoder_hidden_states"][[2, 0]].mean(dim=(1, 2))[:, None, None, None]
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(latents / 2 + mean, timestep, latents).prev_sample
    torch.testing.assert_close(got, latents)


def test_learned_variance_is_left_out():
    samplers = [ConditionalSampler(Halving(n), DDIMScheduler(clip_sample=False), CONDITIONS) for n in (1, 2)]
    one, two = (sampler([0], num_inference_steps=2, generator=seeded()) for sampler in samplers)
    assert torch.equal(one, two)


def test_guidance_moves_from_the_unconditional_answer_past_the_conditional_one():
    negative = {"negative.encoder_hidden_states": torch.zeros(1, 2, 2)}
    transformer, trajectory = Halving(), []
    sampler = ConditionalSampler(transformer, DDIMScheduler(clip_sample=False), CONDITIONS | negative)
    got = sampler([1], num_inference_steps=1, generator=seeded(), guidance_scale=3.0, trajectory=trajectory)
    ((latents, text, timestep),) = transformer.calls
    assert latents.shape[0] == text.shape[0] == timestep.shape[0] == 2
    assert torch.equal(text[0], torch.zeros(2, 2))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(1)
    noise = latents[:1] / 2 + 3 * CONDITIONS["encoder_hidden_states"][1].mean()
    torch.testing.assert_close(got, scheduler.step(noise, scheduler.timesteps[0], latents[:1]).prev_sample)
    assert torch.equal(trajectory[-1], got)


def test_guidance_without_an_unconditional_embedding_is_refused():
    sampler = ConditionalSampler(Halving(), DDIMScheduler(), CONDITIONS)
    with pytest.raises(UsageError, match=r"negative\.encoder_hidden_states"):
        sampler([0], num_inference_steps=1, guidance_scale=2.0)


@pytest.mark.parametrize("name", ["Nothing", "PixArtTransformer2DModel", "SchedulerMixin"])
def test_a_scheduler_that_diffusers_does_not_have_is_refused(name):
    with pytest.raises(UsageError, match=name):
        scheduler_from(name)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 23), channels=st.sampled_from([1, 3]), size=st.integers(1, 130), columns=st.integers(1, 12))
def test_a_contact_sheet_holds_every_image_at_a_whole_zoom(tmp_path_factory, count, channels, size, columns):
    path = tmp_path_factory.mktemp("sheet") / "s.png"
    values = np.linspace(-1, 1, count)
    images = np.broadcast_to(values[:, None, None, None], (count, channels, size, size))
    write_contact_sheet(path, images, columns=columns)
    with Image.open(path) as image:
        pixels = np.asarray(image)
    side = size * max(1, 96 // size)
    across = min(columns, count)
    assert pixels.shape == (-(-count // across) * side, across * side, 3)
    for index, value in enumerate(values):
        top, left = index // across * side, index % across * side
        assert (pixels[top : top + side, left : left + side] == round((value + 1) * 127.5)).all()


def test_latents_that_are_no_images_are_refused_before_any_work(package, cli, copy_of, reseal, tmp_path):
    import json

    latent = copy_of(package)
    manifest = json.loads((latent / "manifest.json").read_text())
    manifest["source"]["config"]["in_channels"] = 4
    (latent / "manifest.json").write_text(json.dumps(manifest))
    reseal(latent)
    cli("sample", latent, "-o", tmp_path / "s.png").refused(2, "4 channels", ".safetensors")
