"""A build ends with a whole package, and every kind of recipe goes through."""

import json

import numpy as np
import onnx
import pytest
import torch

from graphs.passes import PIPELINE
from graphs.passes.patterns import LINEAR_OPS, ROTATE_OPS
from lrq_export import compiler
from lrq_export.compiler import STAGES, build
from lrq_export.errors import CheckFailed, UsageError
from lrq_export.models.pixart import PixArt
from lrq_export.package import load_manifest, verify_hashes
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Recipe, load_recipe
from lrq_export.runtime import PackagedTransformer, feeds, open_runner
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.source import open_source
from lrq_export.verify.ladder import run_torch
from lrq_export.verify.metrics import nmse
from lrq_export.verify.subject import quantized_model

FILES = {
    "manifest.json", "recipe.toml", "stats.safetensors", "quantized.safetensors", "reference.safetensors", "model.onnx",
    "engine/onnxruntime/model.onnx", "engine/onnxruntime/session.json", "report.json", "report.html",
    "graphs/0-trace.onnx", *(f"graphs/{index + 1}-{step.__name__}.onnx" for index, step in enumerate(PIPELINE)),
}  # fmt: skip
LAYERS = 2 * 10  # per block: q, k, v and output of two attentions, two of the feed-forward


def test_a_build_passes_every_rung_of_the_ladder(built):
    assert built.passed
    assert built.stopped_after is None
    rungs = {rung["rung"]: rung for rung in built.report["ladder"]}
    assert list(rungs) == ["R0", "R1", "R2", "R3", "R4", "R5"]
    assert {name: rung["passed"] for name, rung in rungs.items()} == {
        "R0": True, "R1": None, "R2": True, "R3": True, "R4": True, "R5": None}  # fmt: skip
    assert all(rungs[name]["value"] <= 1e-6 for name in ("R0", "R2", "R3", "R4"))
    assert 0 < rungs["R1"]["value"] < 0.1
    assert all(rung["blames"] and rung["title"] for rung in rungs.values())


def test_a_package_holds_exactly_the_files_of_the_design(package, digests):
    assert set(digests(package)) == FILES
    assert [path.name for path in package.parent.iterdir()] == [package.name]


def test_the_manifest_tells_where_a_package_comes_from(package, tiny):
    manifest = verify_hashes(package)
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    resolved = tiny.recipe().model_copy(update={"keep": PixArt.keep}).for_family(PixArt())
    assert Recipe.model_validate(manifest["recipe"]) == resolved
    assert manifest["source"]["config"]["_class_name"] == "PixArtTransformer2DModel"
    assert manifest["source"]["fingerprint"] == open_source(tiny.source).checkpoint.fingerprint()
    assert manifest["scheduler"]["_class_name"] == "DDIMScheduler"
    assert len(manifest["layers"]) == LAYERS
    assert {"torch", "onnx", "onnxruntime", "diffusers"} <= manifest["tool"]["libraries"].keys()
    assert load_recipe(path=package / "recipe.toml") == resolved


def test_the_report_says_what_a_reader_needs(package):
    report = json.loads((package / "report.json").read_text())
    assert {"ladder", "layers", "passes", "sizes", "timings", "warnings", "machine", "tool"} <= report.keys()
    assert [row["stage"] for row in report["timings"]] == [
        "load", "calibrate", "trace", "rewrite", "quantize", "bind", "engine", "verify"]  # fmt: skip
    assert report["warnings"] == []
    assert len(report["layers"]) == LAYERS
    for layer in report["layers"]:
        assert 0 < layer["weight_nmse"] < 0.05
        assert 0 < layer["output_nmse"] < 0.1
        assert layer["reason"]
        assert layer["rms"] > 0
    assert report["sizes"]["packed_ratio"] < 1
    assert str(package.parent) not in (package / "report.html").read_text()


def test_a_second_build_is_up_to_date_and_does_nothing(tiny, package, cli):
    def times():
        return {path: path.stat().st_mtime_ns for path in package.rglob("*")}

    before = times()
    arguments = ("build", tiny.source, "-o", package, *tiny.arguments)
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{package} is up to date\n", "")
    assert json.loads(cli(*arguments, "--json").out.splitlines()[-1])["event"] == "up to date"
    assert times() == before
    assert [path.name for path in package.parent.iterdir()] == [package.name]


def test_an_edited_package_is_built_again(tiny, package, copy_of):
    edited = copy_of(package)
    (edited / "recipe.toml").write_text("")
    result = build(tiny.source, edited, recipe=tiny.recipe(), calibration=tiny.calibration, until="calibrate")
    assert not result.up_to_date
    assert result.stopped_after == "calibrate"


def test_an_unknown_stage_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="rewrite"):
        build(tiny.source, tmp_path / "out", until="paint")


def test_stopping_after_load_writes_nothing(tiny, cli, tmp_path):
    outcome = cli("build", tiny.source, "-o", tmp_path / "out", *tiny.arguments, "--until", "load")
    assert outcome.code == 0
    assert "nothing was written" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_build_without_calibration_warns(tiny, tmp_path, cli):
    from lrq_export.source import gather_inputs

    inputs = gather_inputs(open_source(tiny.source), tiny.recipe(), None, None)
    assert len(inputs.warnings) == 1
    assert "no calibration was given" in inputs.warnings[0]
    assert inputs.calibration["hidden_states"].shape == (8, 1, 8, 8)


# --- other recipes, one block each: what a setting changes, and that engine, model.onnx and torch still agree

RECIPES = {
    "w3a8, groups and signs": (
        "w3a8",
        {"weights.group_size": "12", "rotation.kind": "hadamard", "rotation.signs": "true", "rotation.seed": "5"},
    ),
    "w4a6, no rotation": ("w4a6", {"rotation.kind": "none"}),
    "w4a4": ("w4a8", {"activations.bits": "4", "rotation.kind": "hadamard"}),
    "w2, activations left in floating point": (
        "w4a8",
        {"weights.bits": "2", "activations.bits": "16", "rotation.kind": "hadamard"},
    ),
}
SMALL = {"calibration.samples": "8", "sampling.images": "1", "sampling.steps": "2"}


@pytest.fixture(scope="module")
def one_block(tmp_path_factory, tiny_transformer):
    return tiny_transformer(tmp_path_factory.mktemp("one block") / "model", num_layers=1)


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES.keys())
def engine(request, one_block, tiny, tmp_path_factory):
    """(recipe, folder) of a build up to its engine."""
    preset, changes = request.param
    recipe, out = load_recipe(preset, overrides=SMALL | changes), tmp_path_factory.mktemp("engine") / "package"
    return recipe, build(one_block, out, recipe=recipe, calibration=tiny.calibration, until="engine").out


def example(samples=3, height=6, width=10, text=5):
    generator = torch.Generator().manual_seed(7)
    mask = torch.ones(samples, text)
    mask[0, 2:] = 0
    return {
        "hidden_states": torch.randn(samples, 1, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(samples, text, 16, generator=generator),
        "timestep": torch.tensor([900.0, 500.0, 3.0])[:samples],
        "encoder_attention_mask": mask,
    }


def test_every_recipe_builds_an_engine_that_agrees_with_torch(engine, one_block):
    recipe, folder = engine
    source = open_source(one_block)
    quantized = QuantizedFile(folder / "quantized.safetensors")
    inputs = example()
    wanted = run_torch(PixArt(), quantized_model(PixArt(), source.config, quantized), inputs).numpy()
    drop_in = PackagedTransformer(open_runner(folder, "onnxruntime"), source.config)
    got = drop_in(**inputs, return_dict=False)[0].numpy()
    portable = onnxruntime_answer(folder / "model.onnx", feeds(drop_in.specs, inputs))
    # With rounded activations a value beside a boundary may fall to either side, and layers after it amplify that.
    bound = 1e-9 if recipe.activations.bits == 16 else 1e-3
    assert nmse(got, wanted) <= bound
    assert nmse(portable, wanted) <= bound
    reference = run_torch(PixArt(), source.load(source.model()), inputs).numpy()
    assert 1e-6 < nmse(got, reference) < 0.5  # it is the quantized model, and not the original


def onnxruntime_answer(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def test_a_recipe_is_what_the_graph_does(engine):
    recipe, folder = engine
    graph = onnx.load(folder / "model.onnx").graph
    linears = [node for node in graph.node if node.op_type in LINEAR_OPS]
    dequants = [node for node in graph.node if node.op_type == "TwinLogDequant"]
    rotations = [node for node in graph.node if node.op_type in ROTATE_OPS]
    opened = recipe.activations.bits == 16
    products = 7  # of 10 layers: q, k, v of the self-attention are one, k and v of the cross-attention
    assert (len(linears), len(dequants)) == ((0, 10) if opened else (products, 0))
    assert bool(rotations) == (recipe.rotation.kind == "hadamard")
    for node in linears + dequants:
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        cols = attributes["cols"]
        assert attributes["bits"] == recipe.weights.bits
        assert attributes["group_size"] == (recipe.weights.group_size or cols)
        assert opened or attributes["act_bits"] == recipe.activations.bits
    for node in rotations:
        (signs,) = (onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == node.input[-1])
        assert set(np.unique(signs)) == ({-1.0, 1.0} if recipe.rotation.signs else {1.0})


def test_at_most_two_to_the_bits_values_a_row_and_group(engine):
    recipe, folder = engine
    quantized = QuantizedFile(folder / "quantized.safetensors")
    for name, record in quantized.records.items():
        groups = quantized.layer(name).integer_weight().reshape(record.rows, -1, record.group_size)
        assert max(len(torch.unique(group)) for row in groups for group in row) <= 2**recipe.weights.bits


def broken(traced):
    raise ValueError("as if it were wrong")


def test_a_package_is_written_although_a_gate_does_not_hold_and_a_pass_was_left_out(
    one_block, tiny, cli, tmp_path, monkeypatch
):
    broken.__name__ = "fuse_epilogue"
    monkeypatch.setattr(
        compiler, "PIPELINE", [broken if step.__name__ == broken.__name__ else step for step in PIPELINE]
    )
    out = tmp_path / "package"
    flags = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    outcome = cli(
        "build", one_block, "-o", out, "--preset", "w8a8", "--set", "rotation.kind=hadamard", "--keep-going",
        "--set", "rotation.block=12", "--set", "gates.psnr_db=200", "--calibration", tiny.calibration, *flags,
    )  # fmt: skip
    assert outcome.code == 1
    assert outcome.err == ""
    assert "R5" in outcome.out
    assert "FAILED" in outcome.out
    assert "first broken rung: R5" in outcome.out
    manifest = verify_hashes(out)
    report = json.loads((out / "report.json").read_text())
    assert {rung["rung"]: rung["passed"] for rung in report["ladder"]} == {
        "R0": True, "R1": None, "R2": True, "R3": True, "R4": True, "R5": False}  # fmt: skip
    said = "rewrite: pass fuse_epilogue was left out: as if it were wrong"
    assert said in manifest["warnings"]
    assert said in report["warnings"]
    assert f"warning: {said}" in " ".join(outcome.out.split())
    assert said in (out / "report.html").read_text()
    # 8 bits and rotations in blocks are what this package is.
    ops = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    assert {"Int8Linear", "HadamardRotate"} <= ops
    assert {layer["block"] for layer in manifest["layers"].values()} == {12}
    assert report["ladder"][1]["value"] < 1e-3
    # Asked again, it is not called up to date with success.
    again = cli(
        "build", one_block, "-o", out, "--preset", "w8a8", "--set", "rotation.kind=hadamard", "--keep-going",
        "--set", "rotation.block=12", "--set", "gates.psnr_db=200", "--calibration", tiny.calibration, *flags,
    )  # fmt: skip
    assert again.code == 1


def test_a_node_that_names_no_plugin_ends_a_build(package):
    """`bind_plugins` cannot be left out: TensorRT would run such a node by its body."""
    rewritten = rewritten_graph(package)
    compiler._check_complete(rewritten)
    next(node for node in rewritten.graph.nodes if node.domain).attrs.pop("plugin_namespace")
    with pytest.raises(CheckFailed, match="has no attribute 'plugin_namespace'"):
        compiler._check_complete(rewritten)


def test_progress_tells_every_stage_in_order(tiny, cli, tmp_path):
    outcome = cli("build", tiny.source, "-o", tmp_path / "o", *tiny.arguments, "--until", "calibrate", "--json")
    assert outcome.code == 0
    events = [json.loads(line) for line in outcome.out.splitlines()]
    assert [event["stage"] for event in events if event["event"] == "begin"] == ["load", "calibrate"]
    assert [event["stage"] for event in events if event["event"] == "end"] == ["load", "calibrate"]
    assert events[-1] == {"event": "stopped", "stage": "calibrate", "out": str(tmp_path / "o.partial" / "package")}
    assert max(event.get("done", 0) for event in events) <= 11


def test_a_manifest_names_no_path_of_this_machine(package, tiny):
    manifest = load_manifest(package)
    assert str(tiny.source.parent) not in json.dumps(manifest)
    for name in ("model.onnx", "graphs/0-trace.onnx", "engine/onnxruntime/model.onnx"):
        data = (package / name).read_bytes()
        assert str(tiny.source.parent).encode() not in data
        assert b"site-packages" not in data


def test_stages_end_with_verify():
    assert STAGES[-1] == "verify"


@pytest.mark.parametrize("until", ["load", "verify"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(tiny, copy_of, tmp_path, until):
    source = copy_of(tiny.source)
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(UsageError, match="lies in the source folder"):
        build(source, source / "package", recipe=tiny.recipe(), calibration=tiny.calibration, until=until)
    assert sorted(path.name for path in source.iterdir()) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UsageError, match="needed an empty folder or a package"):
        build(tiny.source, tmp_path / "mine", recipe=tiny.recipe(), calibration=tiny.calibration, until=until)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
