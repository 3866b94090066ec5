"""A config.json is tried before anything is computed: constructed, and run once without numbers."""

import json

import pytest
import torch

from lrq_export import trial
from lrq_export.errors import InputError
from lrq_export.models.pixart import PixArt


@pytest.fixture
def config(tiny):
    return json.loads((tiny.source / "config.json").read_text())


def refused(attempt, path, config, *parts):
    with pytest.raises(InputError) as caught:
        attempt(path, PixArt(), config)
    for part in (f"{path}: ", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"out_channels": None},
        {"in_channels": 4, "out_channels": 8},  # learned variance
        {"sample_size": 10, "interpolation_scale": 0.5},  # as the 256-pixel PixArt-Sigma has it, against its annotation
        {"use_additional_conditions": True},
        {"patch_size": 1, "num_layers": 1, "norm_elementwise_affine": True},
    ],
)
def test_what_runs_is_accepted(config, tmp_path, changes):
    model = trial.construct(tmp_path, PixArt(), config | changes)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    trial.run(tmp_path, PixArt(), config | changes)


def test_what_runs_on_the_meta_device_runs_on_numbers(config, tmp_path):
    """The trial asks for the inputs that a build makes, so it must not be stricter or laxer than they are."""
    changed = config | {"sample_size": 6, "patch_size": 3}
    trial.run(tmp_path, PixArt(), changed)
    model = PixArt().construct(changed).to_empty(device="cpu")
    given = {"hidden_states": torch.zeros(1, 1, 6, 6), "encoder_hidden_states": torch.zeros(1, 2, 16)}
    assert PixArt().call(model, given | {"timestep": torch.zeros(1)}).shape == (1, 1, 6, 6)
    refused(trial.run, tmp_path, changed | {"sample_size": 7}, "height a positive multiple of 3")


def test_a_position_embedding_that_is_not_finite_is_refused(config, tmp_path):
    refused(trial.construct, tmp_path, config | {"interpolation_scale": 0}, "interpolation_scale: got 0", "NaN or Inf")


def test_fewer_channels_out_than_in_are_refused(config, tmp_path):
    changed = config | {"in_channels": 4, "out_channels": 3}
    refused(
        trial.run, tmp_path, changed, "out_channels: got 3", "noise of shape (2, 3, 8, 8) for latents of shape (2, 4,"
    )


def test_each_key_that_may_be_to_blame_is_named(config, tmp_path):
    changed = config | {"attention_head_dim": 3}  # 2 heads of 3 channels cannot be halved for sines and cosines
    refused(trial.construct, tmp_path, changed, "num_attention_heads: got 2", ", or attention_head_dim: got 3")


def test_values_that_are_wrong_together_blame_no_key(config, tmp_path):
    changed = config | {"norm_eps": "x", "sample_size": 17}
    trial.construct(tmp_path, PixArt(), changed)
    refused(trial.run, tmp_path, changed, "does not work with together")
