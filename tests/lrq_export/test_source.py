"""What a build starts from: source, inputs split in two, conditions, and the fingerprint over all of it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lrq_export.errors import InputError
from lrq_export.source import EVALUATION_SAMPLES, fingerprint, gather_inputs, open_source


@pytest.fixture(scope="module")
def source(tiny):
    return open_source(tiny.source)


def test_the_loaded_model_is_the_one_diffusers_loads(source, tiny):
    from diffusers import PixArtTransformer2DModel

    theirs = PixArtTransformer2DModel.from_pretrained(tiny.source).float().eval()
    ours = source.load(source.model())
    given = {
        "hidden_states": torch.randn(2, 1, 8, 8), "encoder_hidden_states": torch.randn(2, 6, 16),
        "timestep": torch.tensor([3, 900]),
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(ours(**given).sample, theirs(**given).sample)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def test_a_model_without_weights_takes_no_memory(source):
    assert {parameter.device.type for parameter in source.model().parameters()} == {"meta"}


def test_a_config_is_completed_by_the_defaults_of_diffusers(copy_of, tiny):
    folder = copy_of(tiny.source)
    config = json.loads((folder / "config.json").read_text())
    del config["norm_eps"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_source(folder).config["norm_eps"] == 1e-6


def test_inputs_that_judge_are_none_that_calibrate(source, tiny):
    inputs = gather_inputs(source, tiny.recipe(), tiny.calibration, None)
    assert len(inputs.calibration["hidden_states"]) == 8
    assert len(inputs.evaluation["hidden_states"]) == 8
    seen = {tuple(row.flatten().tolist()) for row in inputs.calibration["hidden_states"]}
    assert not seen & {tuple(row.flatten().tolist()) for row in inputs.evaluation["hidden_states"]}
    assert inputs.warnings == []


def test_too_few_samples_are_judged_on_seen_inputs_with_a_warning(source, tiny):
    inputs = gather_inputs(source, tiny.recipe(calibration__samples="16"), tiny.calibration, None)
    assert torch.equal(inputs.calibration["timestep"], inputs.evaluation["timestep"])
    assert "too few samples" in inputs.warnings[0]


def test_no_more_inputs_judge_than_needed(source, tiny, tmp_path, tiny_calibration):
    path = tiny_calibration(tmp_path / "c.safetensors", rows=200)
    assert len(gather_inputs(source, tiny.recipe(), path, None).evaluation["timestep"]) == EVALUATION_SAMPLES


def test_conditions_are_the_given_ones_then_the_sources_then_the_recorded(source, tiny, copy_of, tmp_path):
    given = tmp_path / "given.safetensors"
    save_file(
        {"encoder_hidden_states": torch.ones(2, 5, 16), "negative.encoder_hidden_states": torch.zeros(1, 5, 16)}, given
    )
    recipe = tiny.recipe()
    assert gather_inputs(source, recipe, tiny.calibration, given).conditions["encoder_hidden_states"].shape == (
        2,
        5,
        16,
    )
    assert gather_inputs(source, recipe, tiny.calibration, None).conditions["encoder_hidden_states"].shape == (4, 6, 16)
    bare = copy_of(tiny.source)
    (bare / "conditions.safetensors").unlink()
    recorded = gather_inputs(open_source(bare), recipe, tiny.calibration, None).conditions
    assert set(recorded) == {"encoder_hidden_states", "encoder_attention_mask"}
    assert len(recorded["encoder_hidden_states"]) == 8


@pytest.mark.parametrize(
    "tensors", [{"timestep": torch.ones(2)}, {"encoder_hidden_states": torch.full((2, 5, 16), torch.nan)}]
)
def test_wrong_conditions_are_refused(source, tiny, tmp_path, tensors):
    path = tmp_path / "c.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"c\.safetensors"):
        gather_inputs(source, tiny.recipe(), tiny.calibration, path)


def test_the_fingerprint_follows_everything_that_decides_the_bytes(source, tiny, copy_of):
    base = (source, "recipe", [tiny.calibration, None], {"torch": "2"})
    first = fingerprint(*base)
    other = copy_of(tiny.source)
    weights = other / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    changed = [
        (open_source(other), *base[1:]), (source, "other", *base[2:]), (*base[:2], [None, tiny.calibration], base[3]),
        (*base[:2], [None, None], base[3]), (*base[:3], {"torch": "3"}),
    ]  # fmt: skip
    assert first == fingerprint(open_source(copy_of(tiny.source, "same")), *base[1:])
    assert len({first, *(fingerprint(*each) for each in changed)}) == 6
