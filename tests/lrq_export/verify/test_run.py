"""`verify`: repeats the ladder from the files alone, blames the right rung, and lets no edited byte pass."""

import json

import onnx
import pytest
import torch

from graphs.passes import PIPELINE, make_linear
from lrq_export.checkpoint import TensorFile
from lrq_export.errors import InputError
from lrq_export.package import save_tensors_atomic
from lrq_export.verify.run import verify

LAYER = "transformer_blocks.0.attn1.to_q"
PRODUCT = f"{LAYER}+to_k+to_v"  # what model.onnx makes of it and its siblings


@pytest.fixture
def edited(package, copy_of, reseal):
    """Spoil a file of a copy and write the manifest anew, so that no hash tells."""

    def edit(name, spoil):
        folder = copy_of(package)
        spoil(folder / name)
        reseal(folder)
        return folder

    return edit


def broken(report):
    return [rung["rung"] for rung in report["ladder"] if rung["passed"] is False]


def flip_code(path):
    """Another sign and another level for the first weight of one layer."""
    file = TensorFile(path)
    tensors = {name: tensor.clone() for name, tensor in file.read_all().items()}
    tensors[f"{LAYER}.codes"][0] ^= 0x0F
    save_tensors_atomic(path, tensors, file.metadata)


def flip_initializer(name, mask):
    def spoil(path):
        model = onnx.load(path)
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.raw_data = bytes([tensor.raw_data[0] ^ mask]) + tensor.raw_data[1:]
        onnx.save(model, path)

    return spoil


def test_a_package_verifies_from_its_files_alone(package, cli, digests):
    before = digests(package)
    outcome = cli("verify", package, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    events = [json.loads(line) for line in outcome.out.splitlines()]
    assert [event["rung"] for event in events if event["event"] == "rung"] == ["R0", "R1", "R2", "R3", "R4", "R5"]
    assert digests(package) == before


def test_verify_finds_what_the_build_found(package, tiny):
    built = json.loads((package / "report.json").read_text())
    report, samples = verify(package, source=tiny.source)
    assert broken(report) == []
    figures = [{rung["rung"]: rung["value"] for rung in each["ladder"]} for each in (built, report)]
    for name in ("R1", "R5"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-3)
    for got, was in zip(report["layers"], built["layers"], strict=True):
        assert got["layer"] == was["layer"]
        assert got["output_nmse"] == pytest.approx(was["output_nmse"], rel=1e-3)
    assert samples["float"].shape == samples["quantized"].shape == (2, 1, 8, 8)


def test_one_changed_code_of_the_torch_model_breaks_r2_alone(edited):
    report, _ = verify(edited("quantized.safetensors", flip_code))
    assert "R2" in broken(report)
    assert "R3" not in broken(report)


def test_one_changed_code_of_the_portable_graph_breaks_r2_and_r4(edited, cli):
    outcome = cli("verify", edited("model.onnx", flip_initializer(f"{PRODUCT}.codes", 0x0F)))
    assert outcome.code == 1
    assert outcome.err == ""
    assert outcome.out.count("FAILED") == 2
    assert "first broken rung: R2" in outcome.out


def test_one_changed_weight_of_the_engine_breaks_r4_alone(edited):
    report, _ = verify(edited("engine/onnxruntime/model.onnx", flip_initializer(f"{LAYER}.int8", 0x7F)))
    assert broken(report) == ["R4"]
    assert f"{LAYER}.int8" in next(rung["blames"] for rung in report["ladder"] if rung["rung"] == "R4")


def test_a_fault_between_layers_is_blamed_on_the_layer_behind_it(edited):
    def other_epsilon(path):
        model = onnx.load(path)
        norms = [node for node in model.graph.node if node.op_type == "LayerNormRotate"]
        for attribute in norms[-1].attribute:  # before the second block's feed-forward
            if attribute.name == "epsilon":
                attribute.f = 0.1
        onnx.save(model, path)

    report, _ = verify(edited("engine/onnxruntime/model.onnx", other_epsilon))
    assert broken(report) == ["R4"]
    blames = next(rung["blames"] for rung in report["ladder"] if rung["rung"] == "R4")
    assert "the input of transformer_blocks.1.ff.net.0.proj" in blames


def test_a_pass_that_changes_the_function_breaks_r3_alone(edited):
    def scale(path):
        model = onnx.load(path)
        node = next(node for node in model.graph.node if node.op_type == "Softmax")
        for reader in model.graph.node:  # attention without its softmax
            for index, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[index] = node.input[0]
        onnx.save(model, path)

    report, _ = verify(edited(f"graphs/{1 + PIPELINE.index(make_linear)}-make_linear.onnx", scale))
    assert broken(report) == ["R3"]
    (rung,) = (rung for rung in report["ladder"] if rung["rung"] == "R3")
    assert "make_linear" in rung["blames"] or "merge_projections" in rung["blames"]


@pytest.mark.parametrize(
    "name", ["model.onnx", "quantized.safetensors", "report.html", "graphs/0-trace.onnx", "manifest.json"]
)
def test_any_edited_byte_is_refused_with_exit_3(package, cli, copy_of, name):
    folder = copy_of(package)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    cli("verify", folder).refused(3, name)


def test_added_and_missing_files_are_refused(package, copy_of):
    folder = copy_of(package)
    (folder / "graphs" / "note.txt").write_text("hello")
    with pytest.raises(InputError, match=r"note\.txt: does not belong"):
        verify(folder)
    (folder / "graphs" / "note.txt").unlink()
    (folder / "stats.safetensors").unlink()
    with pytest.raises(InputError, match=r"stats\.safetensors: is missing"):
        verify(folder)


def test_the_report_command_writes_one_offline_page(package, cli, tmp_path):
    outcome = cli("report", package, "-o", tmp_path / "page.html")
    assert (outcome.code, outcome.err) == (0, "")
    page = (tmp_path / "page.html").read_text()
    assert "R5" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_another_source_is_refused(package, tiny, copy_of):
    other = copy_of(tiny.source)
    file = TensorFile(other / "diffusion_pytorch_model.safetensors")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in file.read_all().items()}
    save_tensors_atomic(file.path, tensors)
    with pytest.raises(InputError, match="source"):
        verify(package, source=other)
