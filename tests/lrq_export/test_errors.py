"""What a user can get wrong with a build: one line, the right exit code, earlier results untouched."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrq_export import errors
from lrq_export.errors import LrqError

WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn1.to_q.weight"

HADAMARD = ("--set", "rotation.kind=hadamard")


def edited_config(source, **changes):
    path = source / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edited_tensors(path, **changes):
    tensors = load_file(path) | changes
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, path)


def spoilt_weight(value):
    def spoil(source, calibration):
        tensor = load_file(source / WEIGHTS)[TO_Q].clone()
        tensor[1, 2] = value
        edited_tensors(source / WEIGHTS, **{TO_Q: tensor})

    return spoil


def truncated(source, calibration):
    path = source / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def nothing(source, calibration):
    pass


def calibration_of(**changes):
    return lambda source, calibration: edited_tensors(calibration, **changes)


def config_of(**changes):
    return lambda source, calibration: edited_config(source, **changes)


# What is spoilt, further arguments, exit code, what the line must hold.
REFUSED = {
    "no config.json": (lambda s, c: (s / "config.json").unlink(), (), 3, ["config.json", "missing", "save_pretrained"]),
    "config is no JSON": (lambda s, c: (s / "config.json").write_text("{"), (), 3, ["config.json", "not valid JSON"]),
    "no class": (config_of(_class_name=None), (), 3, ["_class_name"]),
    "a misspelt class": (config_of(_class_name="PixartTransformer2DModel"), (), 3, ["'PixArtTransformer2DModel'?"]),
    "an unknown class": (config_of(_class_name="Unet"), (), 3, ["model/config.json: got _class_name 'Unet', needed"]),
    "a config of another depth": (config_of(num_layers=3), (), 3, ["transformer_blocks.2.", "missing"]),
    "a config of another width": (config_of(num_attention_heads=3), (), 3, ["got shape", "needed", "config.json"]),
    "a config of the wrong type": (config_of(num_layers="two"), (), 3, ["config.json: num_layers: got 'two'"]),
    "truncated weights": (truncated, (), 3, [WEIGHTS, "truncated", "got", "needed"]),
    "renamed weights": (
        lambda s, c: (s / WEIGHTS).rename(s / "model.safetensors"), (), 3, [WEIGHTS, "rename model.safetensors"]),
    "no weights": (lambda s, c: (s / WEIGHTS).unlink(), (), 3, [WEIGHTS]),
    "a weight missing": (
        lambda s, c: edited_tensors(s / WEIGHTS, **{TO_Q: None}), (), 3, [TO_Q, "missing"]),
    "an unknown weight": (
        lambda s, c: edited_tensors(s / WEIGHTS, extra=torch.ones(3)), (), 3, ["extra", "unknown"]),
    "NaN weights": (spoilt_weight(float("nan")), (), 3, [TO_Q, "NaN", "[1, 2]"]),
    "Inf weights": (spoilt_weight(float("inf")), (), 3, [TO_Q, "Inf", "[1, 2]"]),
    "calibration of a wrong name": (
        calibration_of(hidden_states=None, hiden_states=torch.ones(16, 1, 8, 8)), (), 3,
        ["hiden_states", "did you mean hidden_states?"]),
    "calibration without a name": (
        calibration_of(encoder_hidden_states=None), (), 3, ["encoder_hidden_states", "missing"]),
    "calibration of wrong channels": (
        calibration_of(hidden_states=torch.ones(16, 4, 8, 8)), (), 3, ["hidden_states", "(16, 4, 8, 8)", "needed"]),
    "calibration of odd height": (
        calibration_of(hidden_states=torch.ones(16, 1, 7, 8)), (), 3, ["height a positive multiple of 2"]),
    "calibration that disagrees": (
        calibration_of(timestep=torch.ones(15)), (), 3, ["timestep", "(15,)", "samples = 16"]),
    "NaN calibration": (
        calibration_of(timestep=torch.full((16,), torch.nan)), (), 3, ["timestep", "NaN"]),
    "calibration that is text": (lambda s, c: c.write_text("hello"), (), 3, ["calibration.safetensors", "got 5 bytes"]),
    "no calibration file": (lambda s, c: c.unlink(), (), 3, ["calibration.safetensors", "No such file"]),
    "conditions of a wrong name": (
        lambda s, c: edited_tensors(s / "conditions.safetensors", labels=torch.ones(4)), (), 3, ["labels"]),
    "conditions of a wrong shape": (
        lambda s, c: save_file({"encoder_hidden_states": torch.ones(4, 6, 17)}, s / "conditions.safetensors"), (), 3,
        ["conditions.safetensors", "(4, 6, 17)"]),
    "conditions that lack one": (
        lambda s, c: save_file({"encoder_attention_mask": torch.ones(4, 6)}, s / "conditions.safetensors"), (), 3,
        ["encoder_hidden_states is missing"]),
    "a scheduler of wrong values": (
        lambda s, c: (s / "scheduler_config.json").write_text('{"beta_schedule": "steep"}'), (), 3,
        ["scheduler_config.json", "DDIMScheduler", "steep"]),
    "a scheduler that takes fewer steps": (nothing, ("--set", "sampling.steps=1001"), 2, ["cannot take 1001 steps"]),
    "a scheduler that is no JSON": (
        lambda s, c: (s / "scheduler_config.json").write_text("]"), (), 3, ["scheduler_config.json"]),
    "an unknown scheduler": (nothing, ("--set", "sampling.scheduler=Euler"), 2, ["'Euler'", "DDIMScheduler"]),
    "a block that does not divide": (
        nothing, (*HADAMARD, "--set", "rotation.block=16"), 2, ["rotation.block is 16", "24 input channels", "one of"]),
    "a block without a Hadamard matrix": (
        nothing, (*HADAMARD, "--set", "rotation.block=6"), 2, ["rotation.block is 6", "12"]),
    "a group that does not divide": (nothing, ("--set", "weights.group_size=7"), 2, ["group_size is 7", "12"]),
    "a misspelt key": (nothing, ("--set", "weights.bit=3"), 2, ["weights.bit", "did you mean weights.bits?"]),
    "a wrong value": (nothing, ("--set", "weights.bits=5"), 2, ["weights.bits", "5", "2, 3, 4 or 8"]),
    "a flag without a value": (nothing, ("--set", "weights.bits"), 2, ["KEY=VALUE"]),
    "an unknown preset": (nothing, ("--preset", "w4a9"), 2, ["w4a9", "did you mean w4a"]),
    "a pattern that matches nothing": (
        nothing, ("--set", 'keep=["transformer_blocks.0.attn3.*"]'), 2, ["attn3", "nearest layer is"]),
    "nothing quantized": (nothing, ("--set", 'keep=["*"]'), 1, ["nothing was left to quantize"]),
    "prompts for a transformer alone": (nothing, ("--prompts", __file__), 2, ["--prompts"]),
    "an unknown stage": (nothing, ("--until", "paint"), 2, ["paint", "rewrite"]),
    "an unknown flag": (nothing, ("--colour", "red"), 2, ["--colour"]),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "flags", "code", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_a_user_error_is_one_line_and_earlier_results_stay(
    tiny, package, cli, copy_of, digests, spoil, flags, code, parts
):
    source, calibration, out = copy_of(tiny.source), copy_of(tiny.calibration), copy_of(package)
    before = digests(out)
    spoil(source, calibration)
    arguments = [str(calibration) if word == str(tiny.calibration) else word for word in tiny.arguments]
    cli("build", source, "-o", out, *arguments, *flags).refused(code, *parts)
    assert digests(out) == before


# What diffusers itself would accept, or refuse in words that name no key; some of it only after minutes of work.
WRONG_IN_CONFIG = {
    "norm_eps": ["x", [1], None, float("nan"), float("inf")],
    "sample_size": [17, -4, 0, 8.0, "big", [8, 8]],
    "patch_size": [0, -1, 2.0, "x"],
    "num_attention_heads": [-1, "x", 2.0],
    "attention_head_dim": [0, -1, 3, "x"],
    "caption_channels": ["x", -1, 16.0, {}],
    "cross_attention_dim": ["x", -1],
    "in_channels": [-1, "x", 1.0],
    "out_channels": [-1, "x", 1.0],
    "num_layers": [2.0, "x", None],
    "interpolation_scale": [0, "x", [2]],
    "activation_fn": ["gelu-exact", 0, None],
    "norm_type": ["ada_norm_double", 0, None],
    "num_embeds_ada_norm": [None],
    "dropout": [-1, 2, "x"],
}
WRONG_VALUES = [(key, value) for key, values in WRONG_IN_CONFIG.items() for value in values]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=[f"{key}={value!r}" for key, value in WRONG_VALUES])
def test_a_wrong_value_of_a_config_is_one_line_that_names_it(tiny, cli, copy_of, tmp_path, recwarn, key, value):
    source = copy_of(tiny.source)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    outcome = cli("build", source, "-o", tmp_path / "out", *tiny.arguments)
    outcome.refused(3, f"{path}: ", f"{key}: got {value!r}, needed a")
    assert not recwarn.list
    assert not list(tmp_path.glob("out*"))


def test_a_misspelt_key_in_a_recipe_file_names_the_nearest(tiny, cli, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[weights]\nbis = 4\n")
    outcome = cli("build", tiny.source, "-o", tmp_path / "out", "--recipe", recipe)
    outcome.refused(2, recipe, "weights.bis", "did you mean weights.bits?")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_is_refused(cli, tmp_path):
    cli("build", tmp_path / "nowhere", "-o", tmp_path / "out").refused(3, "nowhere", "does not exist")
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_holds_something_else_is_refused(tiny, cli, tmp_path):
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"meow")
    cli("build", tiny.source, "-o", out, *tiny.arguments).refused(2, out, "cat.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert (out / "cat.jpg").read_bytes() == b"meow"


def test_an_output_that_is_a_file_is_refused(tiny, cli, tmp_path):
    out = tmp_path / "file"
    out.write_text("text")
    cli("build", tiny.source, "-o", out, *tiny.arguments).refused(2, out, "got a file")
    assert out.read_text() == "text"


def test_too_little_free_disk_is_said_before_work_begins(tiny, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("lrq_export.package._free_bytes", lambda path: 1000)
    cli("build", tiny.source, "-o", tmp_path / "out", *tiny.arguments).refused(4, "got 1000 free bytes", "free")
    assert not (tmp_path / "out").exists()


def test_an_interruption_is_one_line_and_exit_5(tiny, cli, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lrq_export.compiler.trace", interrupt)
    cli("build", tiny.source, "-o", tmp_path / "out", *tiny.arguments).refused(5, "interrupted", "resume")
    assert (tmp_path / "out.partial" / "package" / "stats.safetensors").is_file()


NOT_PACKAGES = {
    "verify": lambda folder: ("verify", folder),
    "inspect": lambda folder: ("inspect", folder),
    "sample": lambda folder: ("sample", folder, "-o", folder / "x.png"),
    "report": lambda folder: ("report", folder, "-o", folder / "x.html"),
}


@pytest.mark.parametrize("command", NOT_PACKAGES.values(), ids=NOT_PACKAGES.keys())
def test_a_folder_that_is_no_package_is_refused(cli, tmp_path, command):
    cli(*command(tmp_path)).refused(3, tmp_path, "manifest.json")
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_error_has_the_exit_code_of_the_design():
    kinds = {kind.__name__: kind.exit_code for kind in LrqError.__subclasses__() if kind.__module__ == errors.__name__}
    assert kinds == {"CheckFailed": 1, "UsageError": 2, "InputError": 3, "MissingError": 4, "Interrupted": 5}


def test_a_bug_keeps_its_traceback(tiny, cli, tmp_path, monkeypatch):
    def bug(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("lrq_export.compiler.open_source", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("build", tiny.source, "-o", tmp_path / "out")
