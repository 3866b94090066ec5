"""The class-conditional DiT: built end to end, called like diffusers' own, conditioned on nothing but its classes."""

import inspect
import json
from pathlib import Path

import onnx
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import save_file

from lrq_export import trial
from lrq_export.calibrate.inputs import load_inputs, synthetic_inputs
from lrq_export.calibrate.record import record
from lrq_export.compiler import build
from lrq_export.errors import InputError, UsageError
from lrq_export.loading import load
from lrq_export.models import family_of
from lrq_export.models.dit import DiT
from lrq_export.plan import plan_layers
from lrq_export.sampling import ConditionalSampler
from lrq_export.source import gather_inputs, open_source
from lrq_export.verify.metrics import nmse
from lrq_export.verify.reference import adapter_error

# Learned variance, and 11 rows of labels: 10 classes and the one that means none.
CONFIG = {
    "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 12, "num_attention_heads": 2,
    "in_channels": 1, "out_channels": 2, "num_embeds_ada_norm": 10,
}  # fmt: skip
NO_CLASS = 10
QUANTIZED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")  # of each block


def new_model(**changes) -> DiTTransformer2DModel:
    """Truncated normal weights, wide enough for its layers to matter."""
    generator, model = torch.Generator().manual_seed(0), DiTTransformer2DModel(**CONFIG | changes).eval()
    for name, parameter in model.named_parameters():
        std = 0.02 if name.endswith("bias") else 0.2
        torch.nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
    return model


def recorded(rows: int = 16) -> dict[str, torch.Tensor]:
    """Inputs as `record` writes them: labels and timesteps are integers."""
    return {
        "hidden_states": torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.arange(rows) % 4 * 300,
        "class_labels": torch.arange(rows) % 11,
    }


def few(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return recorded(rows=3) | {"class_labels": torch.tensor([7, 0, NO_CLASS])} | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A DiT transformer in diffusers layout, in fp16, with a scheduler and one row of conditions per class."""
    folder = tmp_path_factory.mktemp("dit") / "model"
    new_model().half().save_pretrained(folder)
    DDIMScheduler(clip_sample=False).save_pretrained(folder)
    save_file({"class_labels": torch.arange(10)}, folder / "conditions.safetensors")
    return folder


@pytest.fixture(scope="module")
def calibration(folder) -> Path:
    save_file(recorded(), folder.parent / "calibration.safetensors")
    return folder.parent / "calibration.safetensors"


@pytest.fixture(scope="module")
def built(tiny, folder, calibration):
    return build(folder, folder.parent / "package", recipe=tiny.recipe(), calibration=calibration)


@pytest.fixture(scope="module")
def drop_in(built):
    return load(built.out, threads=1)


@pytest.fixture(scope="module")
def original(folder):
    return DiTTransformer2DModel.from_pretrained(folder).float().eval()


@pytest.fixture(scope="module")
def source(folder):
    return open_source(folder)


def test_the_config_s_class_is_of_this_family():
    assert isinstance(family_of("DiTTransformer2DModel"), DiT)


def test_a_build_passes_every_rung_of_the_ladder(built):
    assert built.passed
    assert built.report["warnings"] == []
    rungs = {rung["rung"]: rung for rung in built.report["ladder"]}
    assert {name: rung["passed"] for name, rung in rungs.items()} == {
        "R0": True, "R1": None, "R2": True, "R3": True, "R4": True, "R5": None}  # fmt: skip
    assert all(rungs[name]["value"] <= 1e-6 for name in ("R0", "R2", "R3", "R4"))
    assert 0 < rungs["R1"]["value"] < 0.1
    assert "mask" not in rungs["R0"]["note"]
    fired = {row["name"]: row["fired"] for row in built.report["passes"]}
    assert fired["fold_rotation_into_producer"] == 2


def test_the_adaln_of_every_block_and_the_final_projections_stay_in_floating_point(source, tiny):
    planned = [plan.name for plan in plan_layers(source.model(), DiT(), tiny.recipe())]
    assert planned == [f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in QUANTIZED]


@pytest.mark.parametrize(
    ("layer", "width"),
    [("attn1.to_out.0", 12), ("attn1.to_v", None), ("ff.net.2", None), ("norm1.linear", None)],
)
def test_only_the_input_of_an_attention_s_output_projection_has_heads(source, layer, width):
    assert DiT().head_width(source.model(), f"transformer_blocks.1.{layer}") == width


@pytest.mark.parametrize(
    "changes",
    [{}, {"out_channels": None}, {"sample_size": 6, "patch_size": 3}, {"num_attention_heads": 3, "patch_size": 1}],
)
def test_the_traceable_form_is_the_same_function(changes):
    size = changes.get("sample_size", 8)
    assert adapter_error(DiT(), new_model(**changes), few(hidden_states=torch.ones(3, 1, size, size))) < 1e-11


def test_a_position_embedding_of_another_size_would_be_seen():
    """Else the test above would show nothing."""
    model, given = new_model(), few()
    wanted = DiT().call(model, given)
    traceable = DiT().make_traceable(model)
    traceable.pos_embed.base_size *= 2
    assert nmse(DiT().call(traceable, given).detach(), wanted.detach()) > 1e-6


def test_only_the_batch_is_dynamic(built):
    graph = onnx.load(built.out / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "hidden_states": ["samples", 1, 8, 8], "timestep": ["samples"], "class_labels": ["samples"],
        "sample": ["samples", 2, 8, 8],
    }  # fmt: skip


def test_the_engine_fuses_every_attention(built):
    graph = onnx.load(built.out / "engine/onnxruntime/model.onnx", load_external_data=False).graph
    ops = [node.op_type for node in graph.node]
    assert (ops.count("MultiHeadAttention"), ops.count("Softmax")) == (2, 0)


def test_the_package_is_called_like_the_diffusers_transformer(drop_in, original):
    theirs = list(inspect.signature(original.forward).parameters.values())
    assert [(each.name, each.default) for each in inspect.signature(drop_in).parameters.values()] == [
        (theirs[0].name, theirs[0].default), *((each.name, each.default) for each in theirs[1:])]  # fmt: skip
    given = few()
    with torch.no_grad():
        wanted = original(**given).sample
    got = drop_in(given["hidden_states"], given["timestep"], class_labels=given["class_labels"]).sample
    assert got.shape == wanted.shape == (3, 2, 8, 8)
    assert 1e-7 < nmse(got, wanted) < 0.1
    assert torch.equal(got, drop_in(*given.values(), return_dict=False)[0])


def test_one_label_serves_all_samples(drop_in):
    alike = drop_in(**few(class_labels=torch.tensor([4, 4, 4]))).sample
    assert torch.equal(drop_in(**few(class_labels=torch.tensor([4]))).sample, alike)
    assert not torch.equal(drop_in(**few(class_labels=torch.tensor([5]))).sample, alike)


WRONG_LABELS = {
    "between two classes": (torch.tensor([1.0, 11.5, 2.0]), "got 11.5 at [1]"),
    "far too large": (torch.tensor([1, 2, 99]), "got 99 at [2]"),
    "one too large": (torch.tensor([11, 1, 99]), "got 11 at [0]"),
    "negative": (torch.tensor([1, -1, 1]), "got -1 at [1]"),
    "half of a class": (torch.tensor([0.5, 1.0, 2.0]).half(), "got 0.5 at [0]"),
}


@pytest.mark.parametrize(("labels", "part"), WRONG_LABELS.values(), ids=WRONG_LABELS.keys())
def test_labels_of_no_class_are_refused(drop_in, source, tiny, calibration, tmp_path, labels, part):
    path, specs = tmp_path / "labels.safetensors", DiT().inputs(source.config)

    def refused(attempt, start):
        with pytest.raises(InputError) as caught:
            attempt()
        assert str(caught.value).startswith(f"{start}: {part}, needed labels: whole numbers from 0 to 10")
        assert caught.value.hint

    refused(lambda: drop_in(**few(class_labels=labels)), "class_labels")
    save_file(few(class_labels=labels), path)
    refused(lambda: load_inputs(path, specs), f"{path}: class_labels")
    for name in ("class_labels", "negative.class_labels"):
        save_file({"class_labels": torch.arange(2), name: labels}, path)
        refused(lambda: gather_inputs(source, tiny.recipe(), calibration, path), f"{path}: {name}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16])
def test_labels_come_back_as_integers_whatever_they_were(source, tmp_path, dtype):
    labels = torch.tensor([7, 0, NO_CLASS])
    save_file(few(class_labels=labels.to(dtype)), tmp_path / "x")
    inputs = load_inputs(tmp_path / "x", DiT().inputs(source.config))
    assert list(inputs) == ["hidden_states", "timestep", "class_labels"]
    assert (inputs["class_labels"].dtype, inputs["timestep"].dtype) == (torch.int64, torch.float32)
    assert torch.equal(inputs["class_labels"], labels)


def test_conditions_keep_their_labels(source, tiny, calibration, tmp_path):
    given = {"class_labels": torch.tensor([3, 1]), "negative.class_labels": torch.tensor([NO_CLASS])}
    save_file(given, tmp_path / "c.safetensors")
    read = gather_inputs(source, tiny.recipe(), calibration, tmp_path / "c.safetensors").conditions
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in given.items()
    }
    assert {tensor.dtype for tensor in read.values()} == {torch.int64}


def test_synthetic_labels_are_of_every_class(source):
    labels = synthetic_inputs(DiT().inputs(source.config), samples=500, timesteps=20, seed=0)["class_labels"]
    assert sorted(set(labels.tolist())) == list(range(11))
    assert labels.dtype == torch.int64


def test_latents_of_another_size_are_refused(drop_in):
    with pytest.raises(InputError) as caught:
        drop_in(**few(hidden_states=torch.ones(3, 1, 16, 16)))
    assert str(caught.value).startswith("hidden_states: got shape (3, 1, 16, 16), needed (samples, 1, 8, 8)")


def test_arguments_that_the_package_cannot_honour_are_refused(drop_in):
    with pytest.raises(UsageError, match="no input for cross_attention_kwargs"):
        drop_in(**few(), cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        drop_in(**few(), encoder_hidden_states=torch.ones(3, 6, 16))


def test_guidance_draws_with_the_row_that_means_no_class(drop_in, original):
    conditions = {"class_labels": torch.arange(10), "negative.class_labels": torch.tensor([NO_CLASS])}
    drawn = [
        ConditionalSampler(transformer, DDIMScheduler(clip_sample=False), conditions)(
            [3, 8], num_inference_steps=2, guidance_scale=scale, generator=torch.Generator().manual_seed(0)
        )
        for transformer, scale in ((original, 2.0), (drop_in, 2.0), (drop_in, 1.0))
    ]
    assert drawn[0].shape == (2, 1, 8, 8)
    assert nmse(drawn[1], drawn[0]) < nmse(drawn[2], drawn[0])


def test_what_is_recorded_can_calibrate(original, source, tmp_path):
    sampler = ConditionalSampler(original, DDIMScheduler(clip_sample=False), {"class_labels": torch.arange(10)})
    record(sampler, [3, 8], tmp_path / "x", samples=4, num_inference_steps=2, generator=torch.Generator())
    inputs = load_inputs(tmp_path / "x", DiT().inputs(source.config))
    assert inputs["class_labels"].tolist() == [3, 3, 8, 8]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sample_size": 9}, "noise of shape (2, 2, 8, 8) for latents of shape (2, 1, 9, 9)"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm: got None"),
        ({"norm_type": "ada_norm_single"}, "norm_type: got 'ada_norm_single'"),
    ],
)
def test_a_config_that_does_not_work_is_blamed_on_its_key(folder, tmp_path, changes, part):
    config = json.loads((folder / "config.json").read_text()) | changes
    with pytest.raises(InputError) as caught:
        trial.run(tmp_path, DiT(), config)
    assert part in str(caught.value)
