"""A tiny model of every family with text and flow matching: built, judged, drawn with, and put into its pipeline."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline, WanPipeline
from safetensors.torch import load_file, save_file

from lrq_export.compiler import build
from lrq_export.loading import load
from lrq_export.verify.reference import Reference
from lrq_export.verify.run import verify

# One block of each kind. The schedule is shifted: by the number of tokens, which FLUX alone does, or by a number.
SMALLER = {
    "FluxTransformer2DModel": ({"num_layers": 1, "num_single_layers": 1}, {"use_dynamic_shifting": True}),
    "SD3Transformer2DModel": ({"num_layers": 1}, {"shift": 3.0}),
    "WanTransformer3DModel": ({"num_layers": 1}, {"shift": 3.0}),
}
GUIDANCE = 3.5
PIXELS = 8  # of an image for one of its latents


def recorded(model) -> dict[str, torch.Tensor]:
    """Inputs as a pipeline of one guidance gives them: the tokens of FLUX are 3 rows and 5 columns."""
    inputs = model.inputs(samples=12)
    if "img_ids" in inputs:
        rows, columns = torch.arange(15) // 5, torch.arange(15) % 5
        inputs["img_ids"][:] = torch.stack([torch.zeros(15), rows, columns], dim=1)
        inputs["guidance"][:] = GUIDANCE
    return inputs


def write_source(model, folder) -> None:
    """The transformer, its scheduler and inputs to calibrate on."""
    settings, schedule = SMALLER[model.class_name]
    model.new(**settings).save_pretrained(folder)
    FlowMatchEulerDiscreteScheduler(**schedule).save_pretrained(folder)
    save_file(recorded(model), folder / "calibration.safetensors")


@pytest.fixture(scope="module")
def package_of(tiny, tmp_path_factory):
    """The package of a model, which is built once."""
    recipe, packages = tiny.recipe(sampling__steps="2"), {}

    def package(model):
        if model.class_name not in packages:
            folder = tmp_path_factory.mktemp(model.class_name)
            write_source(model, folder / "source")
            packages[model.class_name] = build(folder / "source", folder / "package", recipe=recipe).out
        return packages[model.class_name]

    return package


@pytest.fixture(scope="module")
def package(each, package_of):
    return package_of(each)


@pytest.fixture(scope="module")
def report(package):
    return json.loads((package / "report.json").read_text())


def test_a_build_passes_every_rung_of_the_ladder(report):
    assert report["warnings"] == []
    rungs = {rung["rung"]: rung for rung in report["ladder"]}
    assert {name: rung["passed"] for name, rung in rungs.items()} == {
        "R0": True, "R1": None, "R2": True, "R3": True, "R4": True, "R5": None}  # fmt: skip
    assert all(rungs[name]["value"] <= 1e-6 for name in ("R0", "R2", "R3", "R4"))
    assert 0 < rungs["R1"]["value"] < 0.1
    assert 10 < rungs["R5"]["value"] < 100


def test_the_trajectory_is_that_of_flow_matching(report):
    assert report["recipe"]["sampling"]["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    first, last = (row["timestep"] for row in report["trajectory"])
    assert first in (1, 1000)  # pure noise; FLUX counts to 1
    assert 0 < last < first


def test_the_report_shows_what_was_drawn(each, package):
    page = (package / "report.html").read_text()
    drawn = {"FluxTransformer2DModel": "6×10", "SD3Transformer2DModel": "8×12", "WanTransformer3DModel": "8×10"}
    assert f"{drawn[each.class_name]} pixels." in page
    assert ("The first frame of each video." in page) == (each.class_name == "WanTransformer3DModel")
    assert page.count("data:image/png;base64,") == 2 * 3


def test_verify_repeats_the_ladder(flux, package_of):
    """With the scheduler of the manifest, whose shift is that of the tokens."""
    reported = json.loads((package_of(flux) / "report.json").read_text())["ladder"]
    again, _ = verify(package_of(flux))
    assert [rung["passed"] for rung in again["ladder"]] == [rung["passed"] for rung in reported]
    assert again["ladder"][-1]["value"] == pytest.approx(reported[-1]["value"], abs=1e-3)


def pipeline_of(class_name: str, scheduler):
    """The family's pipeline without encoders, decoder and transformer."""
    if class_name == "FluxTransformer2DModel":
        return FluxPipeline(scheduler, *[None] * 6)
    if class_name == "SD3Transformer2DModel":
        return StableDiffusion3Pipeline(None, scheduler, *[None] * 7)
    return WanPipeline(None, None, None, scheduler)


def drawn_by_the_pipeline(each, package, rows: list[int], seed: int, steps: int) -> torch.Tensor:
    """The package in its family's pipeline, from the same first latents."""
    reference = Reference.load(package)
    conditions = {name: tensor[rows] for name, tensor in reference.conditions.items()}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        json.loads((package / "manifest.json").read_text())["scheduler"]
    )
    pipeline = pipeline_of(each.class_name, scheduler)
    pipeline.transformer = load(package)
    pipeline.set_progress_bar_config(disable=True)
    first = torch.randn(
        (len(rows), *reference.inputs["hidden_states"].shape[1:]), generator=torch.Generator().manual_seed(seed)
    )
    side = {"height": 6, "width": 10} | each.sizes  # FLUX: of its tokens
    arguments = {
        "prompt_embeds": conditions["encoder_hidden_states"], "latents": first, "num_inference_steps": steps,
        "height": PIXELS * side["height"], "width": PIXELS * side["width"], "output_type": "latent",
        "guidance_scale": GUIDANCE if each.class_name == "FluxTransformer2DModel" else 1.0,
    }  # fmt: skip
    if "pooled_projections" in conditions:
        arguments["pooled_prompt_embeds"] = conditions["pooled_projections"]
    if "frames" in side:
        arguments["num_frames"] = 4 * (side["frames"] - 1) + 1
    return pipeline(**arguments)[0]


def test_a_sample_is_what_the_family_s_pipeline_draws(each, package, cli, tmp_path):
    flags = ("--rows", "1,0", "--seed", "4", "--steps", "3")
    assert cli("sample", package, "-o", tmp_path / "s.safetensors", *flags).code == 0
    got = load_file(tmp_path / "s.safetensors")["samples"]
    wanted = drawn_by_the_pipeline(each, package, [1, 0], seed=4, steps=3)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got[0], got[1])
