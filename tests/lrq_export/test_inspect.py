"""What `inspect`, `init`, `--version` and the help print."""

import json

import onnx.parser
import pytest

from graphs.passes import PIPELINE
from lrq_export import __version__
from lrq_export.inspect import Section
from lrq_export.recipe import load_recipe
from lrq_export.saved_graphs import saved_graphs


def test_inspect_shows_what_a_package_holds(package, cli):
    outcome = cli("inspect", package)
    assert (outcome.code, outcome.err) == (0, "")
    for part in ("PixArtTransformer2DModel", "4-bit weights", "8-bit activations", "20 quantized layers", "timestep",
                 "sample", "8 lrq.TwinLogLinear", "6 lrq.TwinLogLinearResidual", "4 lrq.LayerNormRotate",
                 "2 lrq.GeluTanhRotate", "2 lrq.HadamardRotate", "report.html"):  # fmt: skip
        assert part in outcome.out
    size = (package / "model.onnx").stat().st_size
    assert f"{size:,} bytes  model.onnx" in outcome.out


def test_what_is_shown_is_nothing_but_text():
    section = Section({}, ["a reason\x1b]0;title\x07 of two\nlines", "plain"])
    assert section.text() == "a reason\\x1b]0;title\\x07 of two\nlines\nplain"


def test_inspect_lists_passes_with_near_misses_and_layers_with_reasons(package, cli):
    outcome = cli("inspect", package, "--passes", "--layers")
    assert outcome.code == 0
    for name in (step.__name__ for step in PIPELINE):
        assert f"{name}: fired" in outcome.out
    assert "fold_rotation_into_producer: fired 5 times" in outcome.out
    assert "prepack, for tensorrt and onnxruntime-trt alone: fired 14 times" in outcome.out
    assert "the layer before it: head width 12: folds into the value projection" in outcome.out
    assert outcome.out.count("weight NMSE") == 20


def test_inspect_prints_json_lines(package, cli):
    outcome = cli("inspect", package, "--passes", "--layers", "--json")
    overview, passes, layers = (json.loads(line) for line in outcome.out.splitlines())
    assert overview["ops"]["lrq.TwinLogLinear"] == 8
    assert overview["weights"]["bits"] == 4
    assert passes["passes"][0]["name"] == PIPELINE[0].__name__
    assert all(skip["node"] and skip["reason"] for row in passes["passes"] for skip in row["skipped"])
    assert [row["name"] for row in passes["target_passes"]] == ["prepack", "target_onnxruntime_trt"]
    assert len(layers["layers"]) == 20


@pytest.mark.parametrize("activations", ["float16", "bfloat16"])
def test_half_precision_is_told_where_the_recipe_asks_for_it(package, cli, copy_of, reseal, activations):
    folder = copy_of(package)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"]["engine"]["activations"] = activations
    (folder / "manifest.json").write_text(json.dumps(manifest))
    reseal(folder)
    _, passes = map(json.loads, cli("inspect", folder, "--passes", "--json").out.splitlines())
    rows = {row["name"]: row for row in passes["target_passes"]}
    assert list(rows) == [f"to_{activations}", "prepack", "target_onnxruntime_trt"]
    assert rows[f"to_{activations}"]["targets"] == ["tensorrt", "onnxruntime-trt"]
    assert rows[f"to_{activations}"]["fired"] > 100
    text = cli("inspect", folder, "--dump-after", f"to_{activations}").out
    (output,) = onnx.parser.parse_model(text).graph.output
    assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_reason_is_said_once_with_the_nodes_it_holds_for(package, cli):
    lines = cli("inspect", package, "--passes").out.splitlines()
    at = lines.index("    Gelu computes what it rotates, no linear layer:")
    (skipped,) = [row["skipped"] for row in saved_graphs(package)[1] if row["name"] == "fold_rotation_into_producer"]
    named = {each["node"] for each in skipped if each["reason"] == lines[at].strip(" :")}
    listed = lines[at + 1 :]
    listed = listed[: next(k for k, line in enumerate(listed) if not line.startswith(" " * 8))]
    assert set(" ".join(listed).replace(",", " ").split()) == named
    assert len(named) > 1


@pytest.mark.parametrize(
    ("stage", "has"),
    [
        ("trace", "lrq.TwinLogDequant"),
        ("make_linear", "lrq.TwinLogLinear"),
        ("prepack", 'layout: string = "words"'),
        ("target_onnxruntime_trt", "trt.plugins.TwinLogLinear"),
    ],
)
def test_inspect_prints_the_graph_after_a_pass_as_text(package, cli, stage, has):
    outcome = cli("inspect", package, "--dump-after", stage)
    assert outcome.code == 0
    model = onnx.parser.parse_model(outcome.out)
    assert has in outcome.out
    assert len(model.graph.node) > 100
    assert [value.name for value in model.graph.output] == ["sample"]


def test_inspect_refuses_to_dump_what_is_no_pass(package, cli):
    cli("inspect", package, "--dump-after", "make_linaer").refused(2, "did you mean make_linear?")
    cli("inspect", package, "--dump-after", "trace", "--passes").refused(2, "excludes")


def test_an_edited_manifest_is_refused(package, cli, copy_of):
    edited = copy_of(package)
    path = edited / "manifest.json"
    path.write_text(path.read_text().replace("DDIM", "DDPM"))
    cli("inspect", edited).refused(3, "was edited")


def test_init_writes_a_recipe_with_every_key_and_never_over_one(cli, tmp_path):
    path = tmp_path / "recipe.toml"
    outcome = cli("init", path, "--preset", "w3a8")
    assert (outcome.code, outcome.out) == (0, f"{path}\n")
    assert load_recipe(path=path) == load_recipe("w3a8")
    before = path.read_bytes()
    cli("init", path).refused(2, "already exists")
    assert path.read_bytes() == before


def test_the_version_is_printed(cli):
    outcome = cli("--version")
    assert (outcome.code, outcome.out) == (0, f"lrq-export {__version__}\n")


@pytest.mark.parametrize("command", ["build", "verify", "sample", "inspect", "report", "init"])
def test_every_command_explains_itself(cli, command):
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert "Usage" in outcome.out


@pytest.mark.parametrize(
    "arguments",
    [("paint",), ("build",), ("build", "source"), ("inspect", "a", "b"), ("sample", "p", "-o", "x", "--steps", "y")],
)
def test_wrong_usage_is_one_line_with_exit_2(cli, arguments):
    cli(*arguments).refused(2)
