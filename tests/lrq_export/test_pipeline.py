"""A whole diffusers pipeline, tiny: recording from it, building from it, and running it on a package."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lrq_export import record
from lrq_export.calibrate import pipeline as pipeline_module
from lrq_export.calibrate.inputs import load_inputs
from lrq_export.calibrate.pipeline import open_pipeline, read_prompts, record_prompts
from lrq_export.checkpoint import TensorFile
from lrq_export.compiler import build
from lrq_export.errors import InputError, UsageError
from lrq_export.models.pixart import PixArt
from lrq_export.package import save_tensors_atomic
from lrq_export.recipe import load_recipe
from lrq_export.runtime import PackagedTransformer, open_runner
from lrq_export.source import open_source

pytest.importorskip("transformers", reason="pip install transformers: it makes the tiny text encoder")

PROMPTS = ["a red cat", "a dog"]
LATENT = {"in_channels": 4, "out_channels": 8, "num_layers": 1}  # the second half of the output is a learned variance
# Image sizes of 64 pixels are 8 latents; binning would make them 256 or 1024.
SMALL = {"height": 64, "width": 96, "use_resolution_binning": False}


def pipeline_of(transformer):
    from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [
        ("▁" + word, -1.0) for word in ["a", "cat", "dog", "red"]
    ]
    tokenizer = T5Tokenizer(vocab=[*words, *((letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz▁")], extra_ids=0)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, layers_per_block=1, **blocks)
    pipeline = PixArtAlphaPipeline(
        tokenizer, encoder.eval(), vae.eval(), transformer, DDIMScheduler(beta_schedule="linear", clip_sample=False)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def opened(folder, tiny_transformer, **changes):
    from diffusers import PixArtTransformer2DModel

    written = tiny_transformer(folder / "transformer", **LATENT | changes)
    return pipeline_of(PixArtTransformer2DModel.from_pretrained(written).float().eval())


def draw(pipeline, **changes):
    arguments = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 3.0, "max_sequence_length": 12}
    with torch.no_grad():
        return pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **SMALL | arguments | changes).images


@pytest.fixture(scope="module")
def conditioned(tiny_transformer, tmp_path_factory):
    """A pipeline whose transformer takes resolution and aspect ratio, as the 1024-pixel PixArt does."""
    folder = tmp_path_factory.mktemp("conditioned")
    return opened(folder, tiny_transformer, sample_size=128, use_additional_conditions=True), folder / "transformer"


@pytest.fixture(scope="module")
def recorded(conditioned, tmp_path_factory):
    pipeline, _ = conditioned
    path = tmp_path_factory.mktemp("recorded") / "calibration.safetensors"
    record(
        pipeline,
        PROMPTS,
        path,
        samples=10,
        num_inference_steps=3,
        output_type="latent",
        max_sequence_length=12,
        **SMALL,
    )
    return path


@pytest.fixture(scope="module")
def drop_in(conditioned, recorded, tmp_path_factory):
    """The transformer of that pipeline, built up to its engine."""
    _, source = conditioned
    folder = tmp_path_factory.mktemp("engine")
    conditions = folder / "conditions.safetensors"
    names = (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "added_cond_kwargs.resolution",
        "added_cond_kwargs.aspect_ratio",
    )
    save_tensors_atomic(conditions, {name: TensorFile(recorded).read(name) for name in names})
    changes = {"rotation.kind": "hadamard", "calibration.samples": "8", "sampling.images": "1", "sampling.steps": "1"}
    made = build(
        source, folder / "package", recipe=load_recipe(overrides=changes), calibration=recorded, conditions=conditions,
        until="engine",
    ).out  # fmt: skip
    return PackagedTransformer(open_runner(made, "onnxruntime"), open_source(source).config)


def test_a_recording_holds_every_input_of_guided_calls(recorded, conditioned):
    file = TensorFile(recorded)
    specs = PixArt().inputs(dict(conditioned[0].transformer.config))
    assert set(file.entries) == set(specs)
    inputs = load_inputs(recorded, specs)
    assert inputs["hidden_states"].shape == (10, 4, 8, 12)
    assert file.metadata["rows_seen"] == str(len(PROMPTS) * 3 * 2)  # guidance doubles every step
    assert set(inputs["encoder_attention_mask"].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(inputs["added_cond_kwargs.resolution"], torch.tensor([[64.0, 96.0]]).expand(10, 2))
    torch.testing.assert_close(inputs["added_cond_kwargs.aspect_ratio"], torch.full((10, 1), 64 / 96))
    assert len(inputs["timestep"].unique()) == 3


def test_recording_leaves_the_pipeline_as_it_was(conditioned):
    assert not conditioned[0].transformer._forward_pre_hooks


def test_a_package_runs_in_place_of_the_transformer_with_guidance_masks_and_conditions(conditioned, drop_in):
    pipeline, _ = conditioned
    original = pipeline.transformer
    wanted = draw(pipeline)
    pipeline.register_modules(transformer=None)
    pipeline.transformer = drop_in
    try:
        got = draw(pipeline)
    finally:
        pipeline.transformer = original
    assert got.shape == wanted.shape == (2, 4, 8, 12)
    error = float((got - wanted).square().sum() / wanted.square().sum())
    assert 1e-9 < error < 0.05


def test_the_conditions_of_the_graph_matter(drop_in):
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator), "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
    }  # fmt: skip
    size = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
    first = drop_in(**given, added_cond_kwargs=size).sample
    assert first.shape == (2, 8, 8, 8)
    other = drop_in(**given, added_cond_kwargs=size | {"aspect_ratio": torch.full((2, 1), 2.0)}).sample
    assert not torch.equal(first, other)
    with pytest.raises(InputError, match=r"added_cond_kwargs\.resolution"):
        drop_in(**given)


# --- prompts on the command line


@pytest.fixture(scope="module")
def pipeline_folder(tiny_transformer, tmp_path_factory):
    """A pipeline on disk; 32 latents are what its resolution bins know."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = opened(folder, tiny_transformer, sample_size=32)
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\n\n  a dog  \n", encoding="utf-8")
    return path


FLAGS = [
    "--set", "rotation.kind=hadamard", "--set", "calibration.samples=3", "--set", "sampling.steps=1",
    "--set", "sampling.images=1", "--until", "calibrate",
]  # fmt: skip


def test_prompts_record_a_calibration_beside_the_package_once(pipeline_folder, prompts, cli, tmp_path):
    arguments = ("build", pipeline_folder, "-o", tmp_path / "package", "--prompts", prompts, *FLAGS)
    assert cli(*arguments).code == 0
    (recorded,) = tmp_path.glob("package.calibration-*.safetensors")
    file = TensorFile(recorded)
    assert file.entries["hidden_states"].shape == (4, 4, 32, 32)
    assert "added_cond_kwargs.resolution" not in file.entries
    assert (tmp_path / "package.partial" / "package" / "stats.safetensors").is_file()
    before = recorded.stat().st_mtime_ns
    assert cli(*arguments).code == 0
    assert recorded.stat().st_mtime_ns == before
    prompts.write_text("a cat")
    assert cli(*arguments).code == 0
    assert len(list(tmp_path.glob("package.calibration-*.safetensors"))) == 2


def test_other_settings_or_another_model_are_recorded_anew(pipeline_folder, class_pipeline, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("7")
    monkeypatch.setattr(pipeline_module, "record", lambda pipeline, prompts, path, **_: path.touch())
    recipe = load_recipe()
    keys = ("sampling.steps", "calibration.samples", "calibration.seed")
    recipes = [recipe, recipe, *(load_recipe(overrides={key: "3"}) for key in keys)]
    calls = [(pipeline_folder, each) for each in recipes] + [(class_pipeline, recipe)]
    paths = [record_prompts(folder, tmp_path / "prompts.txt", each, tmp_path / "package") for folder, each in calls]
    assert paths[0] == paths[1]
    assert len(set(paths)) == 5


def test_a_pipeline_brings_its_scheduler(pipeline_folder):
    assert open_source(pipeline_folder).scheduler_config()["beta_schedule"] == "linear"


def test_samples_of_prompts_come_out_of_the_whole_pipeline(pipeline_folder, prompts, tmp_path, monkeypatch):
    """`sample --pipeline --prompts`, with the floating-point transformer in the place of a package."""
    from lrq_export import sample

    monkeypatch.setattr(sample, "load", lambda package: open_pipeline(pipeline_folder).transformer)
    monkeypatch.setattr(sample, "admit", lambda package: {"recipe": load_recipe().model_dump(by_alias=True)})
    written = sample.sample_prompts(tmp_path / "package", tmp_path / "s.png", pipeline_folder, prompts, steps=1, seed=0)
    with Image.open(written) as image:
        assert image.size == (2 * 256, 256)
        assert len(np.unique(np.asarray(image))) > 10


@pytest.fixture(scope="module")
def class_pipeline(pipeline_folder, tmp_path_factory):
    """A pipeline that draws ImageNet's classes, on disk."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2,
    )  # fmt: skip
    parts = open_pipeline(pipeline_folder)
    folder = tmp_path_factory.mktemp("classes") / "pipeline"
    DiTPipeline(transformer, parts.vae, parts.scheduler).save_pretrained(folder)
    index = folder / "model_index.json"  # where the published one has its names; diffusers does not save them
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"3": "tiger shark, tiger"}}))
    return folder


def test_a_pipeline_of_classes_takes_their_numbers_and_names(class_pipeline, prompts, tmp_path, monkeypatch):
    from lrq_export import sample

    prompts.write_text("7\ntiger shark\n")
    recipe = load_recipe(overrides={"calibration.samples": "3", "sampling.steps": "2"})
    recorded = TensorFile(record_prompts(class_pipeline, prompts, recipe, tmp_path / "package"))
    assert set(recorded.read("class_labels").tolist()) == {7, 3, 1000}  # 1000 is guidance without a class
    monkeypatch.setattr(sample, "load", lambda package: open_pipeline(class_pipeline).transformer)
    monkeypatch.setattr(sample, "admit", lambda package: {"recipe": recipe.model_dump(by_alias=True)})
    written = sample.sample_prompts(tmp_path / "package", tmp_path / "s.png", class_pipeline, prompts, steps=1, seed=0)
    with Image.open(written) as image:
        assert image.size[0] == 2 * image.size[1]


@pytest.mark.parametrize("line", ["a red cat", "1000", "99999999999999999999", "-1"])
def test_what_is_no_class_is_refused(class_pipeline, prompts, tmp_path, line):
    prompts.write_text(f"7\n{line}\n")
    with pytest.raises(InputError, match=f"got '{line}', needed a class, 0 to 999.*or its name, e.g. tiger") as caught:
        record_prompts(class_pipeline, prompts, load_recipe(), tmp_path / "package")
    assert str(prompts) in str(caught.value)
    assert list(tmp_path.iterdir()) == [prompts]


def test_prompts_and_calibration_exclude_each_other(pipeline_folder, prompts, cli, tmp_path):
    outcome = cli("build", pipeline_folder, "-o", tmp_path / "o", "--prompts", prompts, "--calibration", prompts)
    outcome.refused(2, "--prompts", "--calibration")


def test_prompts_need_the_whole_pipeline(tiny, prompts, tmp_path):
    with pytest.raises(UsageError, match="needs its whole pipeline"):
        record_prompts(tiny.source, prompts, tiny.recipe(), tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"p\.txt") as caught:
        read_prompts(tmp_path / "p.txt")
    assert caught.value.hint


SPOILT = {
    "no config": lambda folder: (folder / "vae" / "config.json").unlink(),
    "no weights": lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
    "truncated weights": lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99),
    "an index that is no JSON": lambda folder: (folder / "model_index.json").write_text("{"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_pipeline_that_diffusers_cannot_load_is_refused(pipeline_folder, prompts, copy_of, cli, tmp_path, spoil):
    folder = copy_of(pipeline_folder, "spoilt")
    spoil(folder)
    outcome = cli("build", folder, "-o", tmp_path / "o", "--prompts", prompts, *FLAGS)
    last = outcome.err.splitlines()[-1]  # after what diffusers and transformers say of their own
    assert outcome.code == 3
    assert last.startswith(f"lrq-export: {folder}: diffusers cannot load this pipeline: ")
    assert "Traceback" not in outcome.err


def test_a_pipeline_of_pickles_is_refused(pipeline_folder, copy_of):
    folder = copy_of(pipeline_folder, "pickled")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(open_pipeline(pipeline_folder).vae.state_dict(), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(InputError, match="safetensors"):
        open_pipeline(folder)
