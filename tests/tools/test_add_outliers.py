"""The outlier tool: channels reach the peaks asked for, the output stays, and one forgotten column would show."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from add_outliers import Wanted, add_outliers, convert, main, run_on, sites_of
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from lrq_export.calibrate.inputs import load_inputs
from lrq_export.errors import InputError, UsageError
from lrq_export.models import FAMILIES
from lrq_export.source import open_source

WANTED = Wanted(salient=2, mild=3)
TOLERANCE = 1e-12  # of the output's largest value, in float64
SIZES = {
    "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 12, "num_attention_heads": 2,
    "in_channels": 1, "out_channels": 1,
}  # fmt: skip
PIXART = SIZES | {"cross_attention_dim": 24, "caption_channels": 16, "use_additional_conditions": False}
DIT = SIZES | {"num_embeds_ada_norm": 10}


@dataclass(frozen=True)
class Tiny:
    """A small model of random weights in float64, and what it is run on."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]

    def run(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return run_on(self.inputs, FAMILIES[type(model).__name__].call)(model)


def tiny(class_: type[nn.Module], config: dict, text_channels: int = 16) -> Tiny:
    generator = torch.Generator().manual_seed(0)
    model = class_(**config).double().eval()
    for name, parameter in model.named_parameters():
        std = 0.05 if name.endswith("bias") else 0.2
        nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
    rows = 12
    inputs = {
        "hidden_states": torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64),
        "timestep": torch.arange(rows).remainder(4).mul(300).double(),
    }
    if class_ is DiTTransformer2DModel:
        return Tiny(model, inputs | {"class_labels": torch.arange(rows).remainder(10)})
    text = torch.randn(rows, 6, text_channels, generator=generator, dtype=torch.float64)
    return Tiny(model, inputs | {"encoder_hidden_states": text})


MODELS = {
    "pixart": lambda: tiny(PixArtTransformer2DModel, PIXART),
    "dit": lambda: tiny(DiTTransformer2DModel, DIT),
    "pixart without attention biases": lambda: tiny(PixArtTransformer2DModel, PIXART | {"attention_bias": False}),
    "pixart without a caption projection": lambda: tiny(
        PixArtTransformer2DModel, PIXART | {"caption_channels": None}, text_channels=24
    ),
}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_the_output_stays_and_the_peaks_are_reached(build):
    case = build()
    before = case.run(case.model)
    outcome = add_outliers(case.model, case.run, WANTED)
    assert difference(case.run(case.model), before) < TOLERANCE
    assert outcome.difference < TOLERANCE
    for site, factors in outcome.factors:
        absmax = torch.stack([outcome.after[layers[0]].channel_absmax for layers in site.consumers]).amax(0)
        scaled = absmax[factors != 1].sort(descending=True).values
        assert scaled.tolist() == pytest.approx([245, 245, 5, 5, 5], rel=0.01)
    for layer, moments in outcome.after.items():
        assert moments.kurtosis > 2 * outcome.before[layer].kurtosis


@pytest.mark.parametrize(("name", "count"), [("pixart", 2 * (3 + 1 + 1 + 1 + 2)), ("dit", 2 * (3 + 1 + 1))])
def test_every_layer_with_an_exact_factor_is_scaled(name, count):
    """q, k, v and the MLP's first layer behind adaLN, both output projections, keys and values of the text."""
    case = MODELS[name]()
    before = {layer: module.weight.clone() for layer, module in linears(case.model)}
    consumers = [layer for site in sites_of(case.model) for group in site.consumers for layer in group]
    assert len(consumers) == len(set(consumers)) == count
    outcome = add_outliers(case.model, case.run, WANTED)
    for site, factors in outcome.factors:
        for layer in (layer for group in site.consumers for layer in group):
            weight, columns = case.model.get_submodule(layer).weight, factors != 1
            if not layer.endswith("to_v"):  # whose rows were multiplied too
                assert torch.equal(weight[:, ~columns], before[layer][:, ~columns])
                assert torch.allclose(weight[:, columns] * factors[columns], before[layer][:, columns])


def linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_a_column_that_is_not_divided_shows(name):
    case = MODELS[name]()
    before = case.run(case.model)
    outcome = add_outliers(case.model, case.run, WANTED)
    for site, factors in outcome.factors:
        column = int(factors.argmax())
        for layer in (layer for group in site.consumers for layer in group):
            weight = case.model.get_submodule(layer).weight.data
            kept = weight[:, column].clone()
            weight[:, column] *= factors[column]
            changed = difference(case.run(case.model), before)
            weight[:, column] = kept
            assert changed > 1e3 * TOLERANCE, layer


def test_a_row_that_is_not_multiplied_shows():
    case = MODELS["dit"]()
    before = case.run(case.model)
    forgetful = replace(sites_of(case.model)[0], scaled_plus_one=())
    forgetful.scale(case.model, torch.full((24,), 3.0, dtype=torch.float64))
    assert difference(case.run(case.model), before) > 1e-3


def test_blocks_that_share_an_adaln_share_factors_and_others_do_not():
    consumers = {name: [len(site.consumers) for site in sites_of(MODELS[name]().model)] for name in ("pixart", "dit")}
    assert consumers == {"pixart": [2, 2, 1, 1, 1, 1, 2], "dit": [1] * 6}


def test_the_seed_decides_the_channels():
    def channels(seed: int) -> list[list[bool]]:
        case = MODELS["dit"]()
        return [(k != 1).tolist() for _, k in add_outliers(case.model, case.run, replace(WANTED, seed=seed)).factors]

    assert channels(1) == channels(1)
    assert channels(1) != channels(2)


def test_too_few_channels_and_other_models_are_refused():
    case = MODELS["dit"]()
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    with pytest.raises(UsageError, match=r"blocks.0.attn1.to_q: got 24 .* below 245, needed 25"):
        add_outliers(case.model, case.run, Wanted(salient=25))
    with pytest.raises(UsageError, match=r"below 1e-09, needed 3. Fix: ask for fewer"):
        add_outliers(case.model, case.run, replace(WANTED, mild_peak=1e-9))
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    with pytest.raises(UsageError, match="got a UNet2DModel, needed one of DiT"):
        sites_of(UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                             up_block_types=("UpBlock2D",)))  # fmt: skip


@pytest.fixture(params=["pixart", "dit"])
def checkpoint(request, tmp_path) -> Path:
    """The tiny models in fp16 on disk, with calibration inputs."""
    folder, case = tmp_path / "source", MODELS[request.param]()
    case.model.half().save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in case.inputs.items()}, folder / "calibration.safetensors")
    (folder / "scheduler_config.json").write_text("{}")
    (folder / "README.md").write_text("not copied")
    return folder


def test_a_checkpoint_becomes_a_float32_checkpoint_of_the_same_function(checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["add_outliers.py", str(checkpoint), str(out), "--salient", "1", "--mild", "2"])
    main()
    printed = capsys.readouterr().out
    assert "transformer_blocks.1.ff.net.0.proj" in printed
    assert "245.00" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.safetensors", "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json",
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())
    assert {t.dtype for t in load_file(out / "diffusion_pytorch_model.safetensors").values()} == {torch.float32}
    outputs = []
    for folder in (checkpoint, out):
        source = open_source(folder)
        inputs = load_inputs(folder / "calibration.safetensors", source.family.inputs(source.config))
        outputs.append(Tiny(source.load(source.model()), inputs).run(source.load(source.model())))
    assert 0 < difference(*outputs) < 1e-4


def test_the_source_is_never_overwritten_and_inputs_must_be_there(checkpoint, tmp_path, monkeypatch):
    calibration = checkpoint / "calibration.safetensors"
    with pytest.raises(UsageError, match="name a new folder"):
        convert(checkpoint, checkpoint, calibration, WANTED)
    with pytest.raises(InputError, match="nowhere: not found"):
        convert(checkpoint, tmp_path / "out", tmp_path / "nowhere", WANTED)
    monkeypatch.setattr("sys.argv", ["add_outliers.py", str(checkpoint), str(checkpoint)])
    with pytest.raises(SystemExit, match="got the source as output folder"):
        main()


@pytest.mark.parametrize(
    ("changes", "message"), [({"peak": float("inf")}, "--peak: got inf"), ({"mild_peak": 0.0}, "--mild-peak: got 0.0")]
)
def test_peaks_that_no_channel_can_have_are_refused(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        convert(tmp_path, tmp_path / "out", tmp_path / "none", replace(WANTED, **changes))
    assert not (tmp_path / "out").exists()


def test_a_file_as_output_and_a_missing_source_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="got a file, needed a folder"):
        convert(tmp_path, tmp_path / "file", tmp_path / "none", WANTED)
    with pytest.raises(InputError, match="no such folder"):
        convert(tmp_path / "missing", tmp_path / "out", tmp_path / "none", WANTED)
