import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrq_export import recipe as recipes
from lrq_export.errors import CheckFailed, UsageError
from lrq_export.models.flux import Flux
from lrq_export.models.pixart import PixArt
from lrq_export.recipe import KEYS, PRESETS, Recipe, load_recipe, select_layers, to_toml

LAYERS = [f"transformer_blocks.{block}.{name}" for block in range(2) for name in ("attn1.to_q", "ff.net.2")]
LAYERS += ["adaln_single.linear", "proj_out"]


def _written(folder, text):
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _refused(path=None, **arguments):
    with pytest.raises(UsageError) as caught:
        load_recipe(path=path, **arguments)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return str(caught.value)


seeds = st.integers(0, 2**63 - 1)
counts = st.integers(1, 10**9)
bounds = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
finite = st.floats(allow_nan=False, allow_infinity=False)
any_recipe = st.builds(
    Recipe,
    keep=st.none() | st.lists(st.text(min_size=1), max_size=4).map(tuple),
    weights=st.builds(recipes.Weights, bits=st.sampled_from([2, 3, 4, 8]), group_size=st.integers(0, 4096)),
    activations=st.builds(recipes.Activations, bits=st.sampled_from([6, 8, 16])),
    rotation=st.builds(
        recipes.Rotation,
        kind=st.sampled_from(["hadamard", "none"]),
        block=st.integers(0, 4096),
        signs=st.booleans(),
        seed=seeds,
    ),
    calibration=st.builds(recipes.Calibration, samples=counts, batch=counts, timesteps=counts, seed=seeds),
    sampling=st.builds(
        recipes.Sampling,
        steps=counts,
        seed=seeds,
        images=counts,
        guidance_scale=finite,
        scheduler=st.text(string.ascii_letters, min_size=1),
    ),
    gates=st.builds(recipes.Gates, noise_nmse=st.none() | bounds, psnr_db=st.none() | finite, parity_nmse=bounds),
)


@settings(max_examples=60, deadline=None)
@given(any_recipe)
def test_every_recipe_survives_being_written_and_read(tmp_path_factory, recipe):
    path = _written(tmp_path_factory.mktemp("recipe"), to_toml(recipe))
    again = load_recipe(path=path)
    assert again == recipe
    assert to_toml(again) == to_toml(recipe)


def test_toml_names_every_key_in_a_fixed_order():
    text = to_toml(load_recipe())
    positions = [text.index(f"{key.rpartition('.')[2]} = ") for key in ("schema", "keep", "weights.bits")]
    assert positions == sorted(positions)
    assert text.count(" = ") == len(KEYS)


@pytest.mark.parametrize(
    ("family", "scheduler"), [(PixArt, "DDIMScheduler"), (Flux, "FlowMatchEulerDiscreteScheduler")]
)
def test_what_is_left_open_is_the_family_s_choice(family, scheduler):
    recipe = load_recipe().for_family(family())
    assert (recipe.keep, recipe.sampling.scheduler) == (family.keep, scheduler)
    chosen = load_recipe(overrides={"keep": "[]", "sampling.scheduler": "DPMSolverMultistepScheduler"})
    assert chosen.for_family(family()) == chosen


def test_later_layers_win_key_by_key(tmp_path):
    path = _written(tmp_path, "[weights]\nbits = 2\ngroup_size = 64\n")
    recipe = load_recipe("w3a8", path, {"weights.bits": "4", "rotation.kind": "none", "keep": '["a.*"]'})
    assert (recipe.weights.bits, recipe.weights.group_size) == (4, 64)
    assert (recipe.rotation.kind, recipe.keep) == ("none", ("a.*",))
    assert load_recipe("w4a6").activations.bits == 6


def test_presets_gate_nothing_but_parity():
    for name, preset in PRESETS.items():
        assert load_recipe(name) == preset
        assert preset.gates == recipes.Gates(noise_nmse=None, psnr_db=None, parity_nmse=1e-6)


def test_an_override_can_unset_a_gate(tmp_path):
    path = _written(tmp_path, "[gates]\npsnr_db = 30\n")
    assert load_recipe(path=path).gates.psnr_db == 30.0
    assert load_recipe(path=path, overrides={"gates.psnr_db": "none"}).gates.psnr_db is None


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe().weights.bits = 3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[weights]\nbitz = 3", ["mine.toml: weights.bitz: unknown key", "weights.bits?"]),
        ("[weigths]\nbits = 3", ["weigths.bits", "did you mean weights.bits?"]),
        ("[weigths]", ["weigths", "did you mean weights?"]),
        ("bits = 3", ["bits: unknown key", "did you mean"]),
        ("[rotation]\nkeep = []", ["rotation.keep", "top of the recipe"]),
        ("weights = 3", ["weights: got 3, needed a table"]),
        ("[[weights]]\nbits = 3", ["weights: got [{'bits': 3}], needed a table"]),
        ("[weights]\nbits = 5", ["weights.bits: got 5, needed 2, 3, 4 or 8"]),
        ("[weights]\nbits = '4'", ["weights.bits: got '4'"]),
        ("[weights]\nbits = {a = 1}", ["weights.bits: got {'a': 1}"]),
        ("[calibration]\nsamples = 0", ["calibration.samples: got 0", "greater than or equal to 1"]),
        ("[calibration]\nsamples = 1.5", ["calibration.samples: got 1.5", "integer"]),
        ("[gates]\nnoise_nmse = nan", ["gates.noise_nmse: got nan", "finite"]),
        ("[sampling]\nscheduler = 'a b'", ["sampling.scheduler: got 'a b', needed the name of a class"]),
        ("keep = 3", ['keep: got 3, needed a list of strings, or "default"']),
        ("keep = ['']", ["keep: got '', needed a string that is not empty"]),
        ("schema = 2", ["schema: got 2, needed 1"]),
        ("schema = 1\n[weights\n", ["not valid TOML", "line 2"]),
        ('"a\\nb" = 1', ["'a\\nb': unknown key"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(tmp_path, text, parts):
    message = _refused(_written(tmp_path, text))
    assert "mine.toml" in message
    for part in parts:
        assert part in message


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"a = 1\n\xff\xfe")
    assert "byte 0xff at offset 6" in _refused(tmp_path / "mine.toml")
    assert "No such file" in _refused(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"weight.bits": "3"}, "--set: weight.bits: unknown key. Fix: did you mean weights.bits?"),
        ({"weights": "3"}, "such as weights.bits"),
        ({"weights.bits": "3\nx = 1"}, "--set: weights.bits: got '3\\nx = 1'"),
        ({"weights.bits": "many"}, "got 'many', needed 2, 3, 4 or 8"),
    ],
)
def test_a_wrong_override_is_refused(overrides, part):
    assert part in _refused(overrides=overrides)


def test_an_unknown_preset_names_the_nearest():
    assert "did you mean w4a8?" in _refused(preset="w4a9")


def test_select_layers_keeps_what_a_pattern_matches():
    quantized, kept = select_layers(LAYERS, ["adaln_single.*", "proj_out", "*.0.ff.*"])
    assert kept == ["transformer_blocks.0.ff.net.2", "adaln_single.linear", "proj_out"]
    assert sorted(quantized + kept) == sorted(LAYERS)
    assert select_layers(LAYERS, []) == (LAYERS, [])


def test_patterns_are_case_sensitive_and_must_match():
    with pytest.raises(UsageError, match=r"pattern 'Proj_out' matches none of 6 .* nearest layer is proj_out"):
        select_layers(LAYERS, ["Proj_out"])
    with pytest.raises(UsageError, match=r"such as transformer_blocks\.0\.attn1\.to_q"):
        select_layers(LAYERS, ["???"])


def test_nothing_left_to_quantize_is_a_failed_check():
    with pytest.raises(CheckFailed, match="nothing was left to quantize, 6 of 6") as caught:
        select_layers(LAYERS, ["*"])
    assert caught.value.exit_code == 1
