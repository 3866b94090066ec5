"""Schedulers: which ones a build can use is known before it computes anything, and seeds decide all that they draw."""

import inspect

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from lrq_export.errors import InputError, MissingError, UsageError
from lrq_export.models.latents import Latents
from lrq_export.sampling import ConditionalSampler, check_steps, scheduler_from

STOCHASTIC = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
UNSEEDED = "DEISMultistepScheduler"  # its step takes no generator


class Denoiser:
    """A transformer that predicts a tenth of its input."""

    config = type("Config", (), {"in_channels": 1, "sample_size": 4})

    def __call__(self, hidden_states, text, timestep, return_dict):
        return (hidden_states / 10,)


def draw(name, seed, steps=4):
    """The latents after every step, (steps, 2, 1, 4, 4)."""
    sampler, trajectory = ConditionalSampler(Denoiser(), scheduler_from(name), {"text": torch.ones(2, 1)}), []
    generator = torch.Generator().manual_seed(seed)
    drawn = sampler([0, 1], num_inference_steps=steps, generator=generator, trajectory=trajectory)
    assert torch.equal(drawn, trajectory[-1])
    return torch.stack(trajectory)


@pytest.mark.parametrize("name", [*STOCHASTIC, "DDIMScheduler", UNSEEDED])
def test_a_seed_decides_all_latents_and_nothing_else_does(name):
    torch.manual_seed(1)
    first, before = draw(name, seed=5), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, draw(name, seed=5))
    assert not torch.equal(first[-1], draw(name, seed=6)[-1])
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())  # drawing took nothing from the generator that all share


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_steps_draw_noise_of_their_own(name):
    """Else the test above would show nothing: there, the first latents differ too."""

    def first_step(seed):
        scheduler, latents = scheduler_from(name), torch.ones(1, 1, 2, 2)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(seed)
        return scheduler.step(latents / 10, scheduler.timesteps[0], latents, generator=generator).prev_sample

    assert torch.equal(first_step(0), first_step(0))
    assert not torch.equal(first_step(0), first_step(1))


def test_a_scheduler_whose_step_takes_no_generator_is_used_without():
    assert "generator" not in inspect.signature(scheduler_from(UNSEEDED).step).parameters
    check_steps(scheduler_from(UNSEEDED), 4)


@pytest.mark.parametrize("name", FLOW)
def test_schedulers_of_flow_matching_begin_with_noise_and_scale_nothing(name):
    """One step of the only level, 1, leads straight to the sample: the noise less what the model predicts of it."""
    check_steps(scheduler_from(name, {}), 4)
    drawn = Latents((1, 2, 6))
    sampler = ConditionalSampler(Denoiser(), scheduler_from(name, {}), {"text": torch.ones(2, 1)}, drawn)
    got = sampler([0, 1], num_inference_steps=1, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(2, 1, 2, 6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, noise - noise / 10)


def test_the_check_leaves_the_scheduler_as_it_was():
    scheduler = DDIMScheduler()
    before = scheduler.timesteps.clone()
    check_steps(scheduler, 20)
    assert scheduler.num_inference_steps is None
    assert torch.equal(scheduler.timesteps, before)


REFUSED = {
    "more steps than it was trained on": ("DDIMScheduler", {}, 1001, "1001"),
    "as many steps as the config allows": ("DDIMScheduler", {"num_train_timesteps": 10}, 11, "11"),
    "a scheduler of second order": ("HeunDiscreteScheduler", {}, 20, "it makes 39 steps of 20"),
    "flow matching of second order": ("FlowMatchHeunDiscreteScheduler", {}, 20, "it makes 39 steps of 20"),
    "a shift by tokens that images have none of": (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
        20,
        "`mu` must be passed",
    ),
    "a step of other arguments": ("KarrasVeScheduler", {}, 20, "sample_hat"),
    "a scheduler without timesteps": ("ScoreSdeVeScheduler", {}, 20, "no attribute"),
    "an unknown prediction": ("DDIMScheduler", {"prediction_type": "guess"}, 20, "guess"),
    "betas that are NaN": ("DDIMScheduler", {"trained_betas": [float("nan")] * 1000}, 20, "gives NaN or Inf"),
}


@pytest.mark.parametrize(("name", "config", "steps", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_steps_that_a_scheduler_refuses_are_one_line(name, config, steps, part):
    with pytest.raises(UsageError) as caught:
        check_steps(scheduler_from(name, config), steps)
    message = str(caught.value)
    assert message.startswith(f"sampling: {name} cannot take {steps} steps here: ")
    assert part in message
    assert "\n" not in message


def test_refused_steps_end_a_build_before_it_computes_anything(tiny, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("lrq_export.compiler.observe", lambda *_, **__: pytest.fail("calibration began"))
    flags = ("--set", "sampling.scheduler=HeunDiscreteScheduler")
    cli("build", tiny.source, "-o", tmp_path / "out", *tiny.arguments, *flags).refused(2, "it makes 5 steps of 3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "config", [{"beta_schedule": "steep"}, {"num_train_timesteps": "many"}, {"trained_betas": "x"}]
)
def test_a_config_that_makes_no_scheduler_is_refused(config):
    with pytest.raises(InputError, match=r"scheduler_config\.json: diffusers cannot construct DDIMScheduler") as caught:
        scheduler_from("DDIMScheduler", config)
    assert "\n" not in str(caught.value)


def test_a_scheduler_whose_library_is_missing_says_what_to_install(monkeypatch):
    class StandIn(type):
        def __getattr__(cls, name):
            raise ImportError("\nNeedy requires the torchsde library: `pip install torchsde`\n")

    monkeypatch.setattr(diffusers, "NeedyScheduler", StandIn("NeedyScheduler", (), {}), raising=False)
    with pytest.raises(MissingError, match=r"^sampling\.scheduler: Needy requires .* Fix: install it, or set"):
        scheduler_from("NeedyScheduler")
