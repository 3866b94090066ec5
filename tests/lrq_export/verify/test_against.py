"""`verify --against`: a target that agrees, and twins with one fault each, found where it is."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from lrq_export.checkpoint import TensorFile
from lrq_export.engine import tensorrt
from lrq_export.engine.targets import add_engines
from lrq_export.errors import MissingError, UsageError
from lrq_export.package import load_manifest
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.verify import nvidia
from lrq_export.verify import target as target_module
from lrq_export.verify.against import _subject, compare
from lrq_export.verify.bisect import OnnxTensors
from lrq_export.verify.forced import layer_inputs
from lrq_export.verify.target import Target
from lrq_export.verify.target_rungs import Compared
from lrq_export.verify_command import chosen

pytest.importorskip("polygraphy", reason="needs polygraphy: pip install lrq-export[dev]")
LAYER = "transformer_blocks.0.attn1.to_q"
ENGINE = "engine/onnxruntime/model.onnx"
SHOWN = ("rung", "first difference")  # of the lines of --json, besides progress


@pytest.fixture(scope="module")
def with_network(package, tmp_path_factory):
    """A package that holds TensorRT's network in standard ops, and no plan: there is no GPU."""
    folder = shutil.copytree(package, tmp_path_factory.mktemp("against") / "package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "obstacle", no_gpu)
        add_engines(folder, ["tensorrt"], changes={"plugins": "never"})
    return folder


@pytest.fixture(scope="module")
def known_answers():
    return {}


@pytest.fixture(autouse=True)
def answer_once(monkeypatch, known_answers):
    """No test here changes model.onnx, whose answers half of a comparison's time goes into."""
    answers = Compared.answers.func

    def of_any(self):
        key = tuple(case["hidden_states"].tobytes() for case in self.cases)
        if key not in known_answers:
            known_answers[key] = answers(self)
        return known_answers[key]

    monkeypatch.setattr(Compared, "answers", property(of_any))


def no_gpu(target):
    return MissingError(f"{target}: this machine has no CUDA GPU", hint="find one that has")


@pytest.fixture
def edited(copy_of, reseal):
    """A copy of a package whose model was spoilt, with hashes that do not tell."""

    def edit(package, name, spoil):
        folder = copy_of(package)
        model = onnx.load(folder / name)
        spoil(model)
        onnx.save(model, folder / name)
        reseal(folder)
        return folder

    return edit


def flip(name, mask, byte=0):
    def spoil(model):
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        raw = bytearray(tensor.raw_data)
        raw[byte] ^= mask
        tensor.raw_data = bytes(raw)

    return spoil


def reader(model, name):
    return next(node for node in model.graph.node if name in node.input)


def failed(findings):
    return [rung.rung for rung in findings.broken]


def test_the_engine_agrees_and_nothing_is_written(package, cli, digests):
    before = digests(package.parent)
    outcome = cli("verify", package, "--against", "onnxruntime", "--inputs", 3, "--bisect", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    rungs = [event for line in outcome.out.splitlines() if (event := json.loads(line))["event"] == "rung"]
    assert [rung["rung"] for rung in rungs] == ["T1", "T2", "T3"]
    assert all(rung["passed"] for rung in rungs)
    assert rungs[1]["value"] < 1e-11
    assert rungs[2]["cosine"] > 0.9999
    assert 0 < rungs[2]["quantiles"]["0.5"] < rungs[2]["quantiles"]["1"] < 0.1
    assert digests(package.parent) == before


def test_one_changed_code_is_found_and_can_be_replayed(package, edited, cli):
    folder = edited(package, ENGINE, flip(f"{LAYER}.int8", 0x7F))
    node = reader(onnx.load(folder / ENGINE), f"{LAYER}.int8")
    outcome = cli("verify", folder, "--against", "onnxruntime", "--bisect", "--json")
    assert outcome.code == 1
    events = [event for line in outcome.out.splitlines() if (event := json.loads(line))["event"] in SHOWN]
    assert [event["rung"] for event in events if not event.get("passed", True)][:2] == ["T1", "T2"]
    assert f"{LAYER}.int8" in events[0]["blames"]
    found = events[-1]
    # The product has no tensor of its own in model.onnx; the layer's output is the first that has.
    assert found["tensor"] in names_after(folder / ENGINE, node)
    assert replayed(found["replay"]) == 1


def names_after(path, node):
    """Tensors computed from a node through nodes that each have one reader."""
    model, found = onnx.load(path), list(node.output)
    while len(readers := [each for each in model.graph.node if found[-1] in each.input]) == 1:
        found += readers[0].output
    return found


def replayed(command):
    words = shlex.split(command)
    assert words[:2] == ["polygraphy", "run"]
    program = Path(sys.executable).with_name("polygraphy")
    return subprocess.run([program, *words[1:]], capture_output=True, text=True).returncode


def test_a_code_that_only_its_bytes_betray_is_shown_where_it_acts(package, edited, tmp_path, monkeypatch):
    """In wide layers one code drowns; a bound that sees nothing does here what they do."""
    monkeypatch.setattr(Compared, "_parity", 1.0)
    name = "transformer_blocks.1.ff.net.2.int8"
    folder = edited(package, ENGINE, flip(name, 0x01))
    findings = compare(folder, "onnxruntime", replay=tmp_path / "replay")
    assert failed(findings) == ["T1"]
    assert findings.bisection.divergence.tensor == reader(onnx.load(folder / ENGINE), name).output[0]
    assert findings.bisection.divergence.op == "com.microsoft.MatMulIntegerToFloat"
    assert 0 < findings.bisection.divergence.nmse < 1e-3


def test_one_changed_scale_is_found(package, edited, tmp_path):
    name = "transformer_blocks.1.ff.net.2.scale"
    folder = edited(package, ENGINE, flip(name, 0x40, byte=2))  # the exponent's lowest bit is in the third byte
    findings = compare(folder, "onnxruntime", replay=tmp_path / "replay")
    assert failed(findings)[:2] == ["T1", "T2"]
    assert findings.bisection.divergence.tensor in names_after(
        folder / ENGINE, reader(onnx.load(folder / ENGINE), name)
    )
    assert "first differs at" in findings.bisection.divergence.line()


def test_a_fault_that_no_weight_shows_is_found(package, edited, tmp_path):
    def other_epsilon(model):
        norms = [node for node in model.graph.node if node.op_type == "LayerNormRotate"]
        next(each for each in norms[-1].attribute if each.name == "epsilon").f = 0.1

    folder = edited(package, ENGINE, other_epsilon)
    findings = compare(folder, "onnxruntime", replay=tmp_path / "replay")
    assert failed(findings)[0] == "T2"
    assert "the input of transformer_blocks.1.ff.net.0.proj" in findings.broken[0].blames
    assert "LayerNormRotate" in findings.bisection.divergence.op


def test_a_weight_that_is_wrong_before_a_fault_that_shows_is_found_first(package, edited, tmp_path):
    """Too little for any bound: what is seen of it is further down, where it was not made."""
    name = "transformer_blocks.0.attn1.to_out.0.bias"

    def spoil(model):
        flip(name, 0x01)(model)
        norms = [node for node in model.graph.node if node.op_type == "LayerNormRotate"]
        next(each for each in norms[-1].attribute if each.name == "epsilon").f = 0.1

    findings = compare(edited(package, ENGINE, spoil), "onnxruntime", replay=tmp_path / "replay")
    assert failed(findings)[:2] == ["T1", "T2"]
    assert findings.bisection.divergence.tensor == reader(onnx.load(package / ENGINE), name).output[0]
    assert findings.bisection.divergence.nmse < 1e-9


def test_a_fault_before_a_wrong_weight_is_found_first(package, edited, tmp_path):
    """The twin of that."""

    def spoil(model):
        flip("proj_out.bias", 0x01)(model)
        norms = [node for node in model.graph.node if node.op_type == "LayerNormRotate"]
        next(each for each in norms[0].attribute if each.name == "epsilon").f = 0.1

    findings = compare(edited(package, ENGINE, spoil), "onnxruntime", replay=tmp_path / "replay")
    assert failed(findings)[:2] == ["T1", "T2"]
    assert "LayerNormRotate" in findings.bisection.divergence.op


def test_a_wrong_weight_is_looked_for_in_onnx_runtime_though_a_gpu_found_more(gpu, reseal, monkeypatch, tmp_path):
    """Bit for bit, as no other library computes."""
    folder, spoilt = gpu
    network = folder / "engine/tensorrt/model.onnx"
    model = onnx.load(network)
    flip("transformer_blocks.0.attn1.to_out.0.bias", 0x01)(model)
    onnx.save(model, network)
    reseal(folder)
    spoilt.add(layer_inputs(rewritten_graph(folder))["transformer_blocks.1.attn1.to_out.0"])
    compared = Compared(_subject(folder, load_manifest(folder), None, 3), Target("tensorrt", folder))
    assert not compared.weights().passed
    assert not compared.layers_on_gpu().passed
    monkeypatch.setattr(nvidia, "TensorRtTensors", None)
    found = compared.bisect(tmp_path / "replay")
    assert 0 < found.divergence.nmse < 1e-9


def test_the_network_of_tensorrt_runs_in_onnx_runtime_where_there_is_no_gpu(with_network, cli):
    outcome = cli("verify", with_network, "--against", "tensorrt")
    assert outcome.code == 0
    assert outcome.out.count(" ok ") == 3
    assert "not run here: tensorrt" in outcome.out.replace("\n", " ")
    assert f"lrq-export verify {with_network} --against tensorrt" in outcome.out


def test_one_changed_code_of_the_network_is_found(with_network, edited, tmp_path):
    codes = f"{LAYER}+to_k+to_v.codes"
    findings = compare(
        edited(with_network, "engine/tensorrt/model.onnx", flip(codes, 0x0F)), "tensorrt", replay=tmp_path / "replay"
    )
    assert failed(findings)[:2] == ["T1", "T2"]
    assert codes in findings.broken[0].blames
    assert findings.bisection.divergence.nmse > 1e-6


@pytest.fixture(scope="module")
def with_half_network(with_network, tmp_path_factory):
    """The same whose activations are float16."""
    folder = shutil.copytree(with_network, tmp_path_factory.mktemp("half") / "package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "obstacle", no_gpu)
        add_engines(folder, ["tensorrt"], changes={"plugins": "never", "activations": "float16"})
    return folder


def test_a_network_in_half_precision_agrees_within_what_that_costs(with_half_network):
    target = Target("tensorrt", with_half_network)
    assert (target.activations, target.runs_in_onnxruntime) == ("float16", True)
    findings = compare(with_half_network, "tensorrt")
    assert failed(findings) == []
    assert [rung.rung for rung in findings.rungs] == ["T1", "T2", "T3"]
    assert 0 < findings.rungs[1].value < findings.rungs[1].bound == 1e-3


def test_another_function_in_half_precision_is_found(with_half_network, edited):
    def sharpen(model):
        node = next(node for node in model.graph.node if node.op_type == "Softmax")
        node.op_type = "Sigmoid"
        del node.attribute[:]

    findings = compare(edited(with_half_network, "engine/tensorrt/model.onnx", sharpen), "tensorrt")
    assert failed(findings)[0] == "T2"
    assert "attn" in findings.broken[0].blames


@pytest.fixture
def gpu(with_network, copy_of, reseal, monkeypatch, known_answers, plan_of):
    """A package with a plan, and in TensorRT's place right answers; `spoilt` tensors come out 2 % too large."""
    folder, spoilt = copy_of(with_network), set()
    (folder / "engine/tensorrt/model.plan").write_bytes(plan_of("tensorrt", "11"))
    ranges = {"samples": [1, 2, 4], "height": [8, 8, 8], "width": [8, 8, 8], "text": [6, 6, 6]}
    facts = {"target": "tensorrt", "plugins": False, "profiles": [ranges], "version": "11"}
    (folder / "engine/tensorrt/build.json").write_text(json.dumps(facts))
    reseal(folder)

    def run(target, cases, *, model=None, outputs=(), engine=None, profiles=None):
        names = outputs or ["sample"]
        assert (engine is None) == (model is not None)
        assert profiles is None or profiles == [0] * len(cases)
        if model is not None and model.name == "target.onnx":  # a step, of any tensors
            answers = [OnnxTensors(model, case)(names) for case in cases]
        else:
            ((_, known),) = known_answers.items()
            answers = [{name: each[name] for name in names} for each in known[: len(cases)]]
        return [{name: array * (1.02 if name in spoilt else 1) for name, array in each.items()} for each in answers]

    monkeypatch.setattr(target_module, "machine_obstacle", lambda target: None)
    monkeypatch.setattr(target_module, "run_obstacle", lambda package, target: None)
    monkeypatch.setattr(nvidia, "run", run)
    return folder, spoilt


def test_with_a_gpu_layers_and_the_plan_are_compared_in_tensorrt(gpu, tmp_path):
    folder, spoilt = gpu
    tensor = layer_inputs(rewritten_graph(folder))["transformer_blocks.1.attn1.to_out.0"]
    spoilt |= {tensor, "sample"}
    findings = compare(folder, "tensorrt", replay=tmp_path / "replay")
    assert [rung.rung for rung in findings.rungs] == ["T1", "T2", "T3", "T4", "T5"]
    assert failed(findings) == ["T4", "T5"]
    assert findings.not_run is None
    assert "first at the input of transformer_blocks.1.attn1.to_out.0" in findings.broken[0].blames
    assert "1 of 2 cases fit" in findings.rungs[-1].note  # the other is of other sizes
    assert findings.bisection.divergence.tensor == tensor
    assert " --trt --strongly-typed " in findings.bisection.command
    spoilt.clear()
    compared = Compared(_subject(folder, load_manifest(folder), None, 3), Target("tensorrt", folder))
    assert compared.layers_on_gpu().passed
    assert compared.output_on_gpu().passed


def test_why_there_is_no_first_tensor_is_told(gpu, cli, package, tmp_path, monkeypatch):
    folder, spoilt = gpu
    tensor = layer_inputs(rewritten_graph(folder))["transformer_blocks.1.attn1.to_out.0"]
    compared = Compared(_subject(folder, load_manifest(folder), None, 3), Target("tensorrt", folder))
    assert "every layer agrees" in compared.bisect(tmp_path / "none").lacks
    assert not (tmp_path / "none").exists()
    spoilt.add(tensor)
    assert not compared.layers_on_gpu().passed
    spoilt.clear()  # run alone, it is right
    assert f"the part that leads to {tensor} agrees" in compared.bisect(tmp_path / "alone").lacks
    monkeypatch.setattr(Compared, "layers_on_gpu", Compared.layers)  # its engines give right answers, the plan does not
    spoilt.add("sample")
    outcome = cli("verify", folder, "--against", "tensorrt", "--bisect")
    assert outcome.code == 1
    assert "no first tensor to show: given the same input, every layer agrees" in outcome.out
    compared = Compared(_subject(package, load_manifest(package), None, 3), Target("onnxruntime", package))
    compared.changed_weight = f"{LAYER}.int8"
    assert f"what reads {LAYER}.int8 computes the same" in compared.bisect(tmp_path / "weight").lacks


def test_a_network_for_plugins_needs_a_gpu(package, copy_of, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt, "obstacle", no_gpu)
    monkeypatch.setattr(target_module, "machine_obstacle", no_gpu)
    monkeypatch.setattr(tensorrt, "find_library", lambda: tmp_path / "liblrq_plugins.so")
    folder = copy_of(package)
    add_engines(folder, ["tensorrt"])
    again = f"lrq-export verify {folder} --against tensorrt"
    cli("verify", folder, "--against", "tensorrt").refused(4, "no CUDA GPU", again)


def test_what_cannot_be_compared_is_refused(package, cli, tmp_path):
    cli("verify", package, "--against", "tensorrt").refused(4, "no network for tensorrt", "--target tensorrt")
    cli("verify", package, "--against", "openvino").refused(2, "--against", "tensorrt-rtx")
    cli("verify", package, "--bisect").refused(2, "--against")
    cli("verify", package, "--against", "onnxruntime", "--inputs", "none").refused(2, "--inputs", "a number of samples")


def test_recorded_inputs_take_the_place_of_the_package_s_own(package, tiny):
    subject = _subject(package, load_manifest(package), tiny.calibration, 2)
    recorded = TensorFile(tiny.calibration).read("hidden_states")
    assert [len(case["hidden_states"]) for case in subject.cases] == [2, 3]  # the second are random, of other sizes
    assert all((recorded == row).flatten(1).all(1).any() for row in subject.few["hidden_states"])


def test_inputs_are_a_number_a_file_or_the_one_file_of_a_folder(tiny, tmp_path):
    assert chosen(None) == {}
    assert chosen("5") == {"samples": 5}
    assert chosen(str(tiny.calibration)) == {"inputs": tiny.calibration}
    with pytest.raises(UsageError, match="holds 0 safetensors"):
        chosen(str(tmp_path))
    (tmp_path / "one.safetensors").touch()
    assert chosen(str(tmp_path)) == {"inputs": tmp_path / "one.safetensors"}
