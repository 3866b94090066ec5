"""What a build starts from: source, inputs split in two, conditions, and the fingerprint over all of it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lrq_export.errors import InputError
from lrq_export.models import current_config
from lrq_export.package import json_bytes
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


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_from_before_the_family_had_a_class_of_its_own(copy_of, tiny, source):
    """As published: PixArt-XL-2-512x512 says Transformer2DModel."""
    folder = copy_of(tiny.source)
    former = {"double_self_attention": False, "num_vector_embeds": None, "use_linear_projection": False}
    rewrite_config(folder, _class_name="Transformer2DModel", norm_type="ada_norm_single", **former)
    assert open_source(folder).config == source.config
    for unknown in ("layer_norm", None, ["ada_norm_single"]):
        rewrite_config(folder, norm_type=unknown)
        with pytest.raises(InputError, match="got _class_name 'Transformer2DModel', needed one of PixArt"):
            open_source(folder)


def test_the_norm_tells_former_models_apart():
    former = {"_class_name": "Transformer2DModel", "_diffusers_version": "0.12", "cross_attention_dim": None}
    dit = current_config(former | {"norm_type": "ada_norm_zero", "num_layers": 28})
    assert dit == {
        "_class_name": "DiTTransformer2DModel", "_diffusers_version": "0.12", "norm_type": "ada_norm_zero",
        "num_layers": 28,
    }  # fmt: skip
    assert current_config(former | {"norm_type": "ada_norm_single"})["_class_name"] == "PixArtTransformer2DModel"
    assert current_config({"_class_name": "DiTTransformer2DModel", "extra": 1})["extra"] == 1


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


TEXT, MASK, NEGATIVE = "encoder_hidden_states", "encoder_attention_mask", "negative.encoder_hidden_states"


def conditions(source, tiny, path, **tensors):
    """What a build takes from a file that holds 3 rows of text and these."""
    save_file({TEXT: torch.ones(3, 5, 16)} | tensors, path)
    return gather_inputs(source, tiny.recipe(), tiny.calibration, path).conditions


def test_conditions_are_read_as_float32_whatever_they_were(source, tiny, tmp_path):
    given = {TEXT: torch.rand(3, 5, 16).bfloat16(), MASK: torch.tensor([[1, 1, 1, 0, 0]] * 3)}
    read = conditions(source, tiny, tmp_path / "c.safetensors", **given)
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}
    assert read.keys() == given.keys()
    assert all(torch.equal(read[name], tensor.float()) for name, tensor in given.items())


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_unconditional_embeddings_may_have_rows_of_their_own_number(source, tiny, tmp_path, rows):
    unconditional = {NEGATIVE: torch.zeros(rows, 5, 16), f"negative.{MASK}": torch.ones(rows, 5)}
    read = conditions(source, tiny, tmp_path / "c.safetensors", **unconditional)
    assert {name: len(tensor) for name, tensor in read.items()} == {TEXT: 3} | dict.fromkeys(unconditional, rows)


WRONG_CONDITIONS = {
    "an input that is no condition": ({"timestep": torch.ones(3)}, "got an input timestep"),
    "a name that nothing has": ({"labels": torch.ones(3)}, "got an input labels"),
    "a misspelt unconditional": ({"negativ.encoder_hidden_states": torch.ones(1, 5, 16)}, "did you mean negative.enc"),
    "another width": ({TEXT: torch.ones(3, 5, 15)}, f"{TEXT}: got shape (3, 5, 15), needed (samples, text, 16)"),
    "another rank": ({TEXT: torch.ones(5, 16)}, f"{TEXT}: got shape (5, 16)"),
    "no rows": ({TEXT: torch.ones(0, 5, 16)}, "samples a positive multiple of 1"),
    "a mask of other rows": ({MASK: torch.ones(2, 5)}, f"{MASK}: got shape (2, 5)"),
    "a mask of another length": ({MASK: torch.ones(3, 4)}, f"text = 5 as in {TEXT}"),
    "an unconditional of another length": ({NEGATIVE: torch.ones(1, 4, 16)}, f"text = 5 as in {TEXT}"),
    "an unconditional of another width": ({NEGATIVE: torch.ones(1, 5, 15)}, f"{NEGATIVE}: got shape (1, 5, 15)"),
    "unconditionals that disagree": (
        {NEGATIVE: torch.ones(2, 5, 16), f"negative.{MASK}": torch.ones(1, 5)}, f"= 2 as in {NEGATIVE}"),
    "NaN": ({TEXT: torch.full((3, 5, 16), torch.nan)}, f"{TEXT}: got 240 NaN or Inf"),
    "Inf in an unconditional": ({NEGATIVE: torch.full((1, 5, 16), torch.inf)}, f"{NEGATIVE}: got 80 NaN or Inf"),
    "complex numbers": ({TEXT: torch.ones(3, 5, 16, dtype=torch.complex64)}, "needed real numbers"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "part"), WRONG_CONDITIONS.values(), ids=WRONG_CONDITIONS.keys())
def test_wrong_conditions_are_refused(source, tiny, tmp_path, tensors, part):
    path = tmp_path / "c.safetensors"
    with pytest.raises(InputError) as caught:
        conditions(source, tiny, path, **tensors)
    assert str(caught.value).startswith(f"{path}: ")
    assert part in str(caught.value)


def test_conditions_without_the_text_are_refused(source, tiny, tmp_path):
    save_file({MASK: torch.ones(3, 5)}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=f"{TEXT} is missing"):
        gather_inputs(source, tiny.recipe(), tiny.calibration, tmp_path / "c.safetensors")


def test_a_scheduler_with_an_open_bound_is_kept_as_json(copy_of, tiny):
    """The scheduler that PixArt is published with has lambda_min_clipped = -Infinity, which a manifest cannot hold."""
    from diffusers import DPMSolverMultistepScheduler

    folder = copy_of(tiny.source)
    DPMSolverMultistepScheduler(solver_order=3).save_pretrained(folder)
    assert "-Infinity" in (folder / "scheduler_config.json").read_text()
    kept = open_source(folder).scheduler_config()
    assert json_bytes(kept)
    again = DPMSolverMultistepScheduler.from_config(kept)
    assert (again.config.lambda_min_clipped, again.config.solver_order) == (-torch.inf, 3)


def test_an_unknown_class_names_the_file_that_says_it(copy_of, tiny):
    path = copy_of(tiny.source) / "config.json"
    path.write_text('{"_class_name": "PixartTransformer2DModel"}')
    with pytest.raises(InputError) as caught:
        open_source(path.parent)
    assert str(caught.value).startswith(f"{path}: got _class_name 'PixartTransformer2DModel', needed one of PixArt")
    assert "did you mean 'PixArtTransformer2DModel'?" in str(caught.value)


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
