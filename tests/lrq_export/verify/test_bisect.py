"""Halving over graphs with one planted fault, whose place is known."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrq_export.verify.bisect import OnnxTensors, finite, first_divergence, save_replay
from lrq_export.verify.metrics import cosine, error_quantiles

DEPTH, WIDTH = 40, 8
BOUND = 1e-8


def chain(path, faulty=None):
    """x -> MatMul -> Tanh -> ..., joined at the end with a branch of its own; `faulty`: the layer of another weight."""
    generator = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer in range(DEPTH):
        weight = (generator.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
        if layer == faulty:
            weight[2, 3] += 0.25
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"m{layer}"], name=f"MatMul.{layer}"))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"t{layer}"], name=f"Tanh.{layer}"))
        last = f"t{layer}"
    for layer in range(DEPTH):
        nodes.append(helper.make_node("Sin", ["x" if layer == 0 else f"s{layer - 1}"], [f"s{layer}"]))
    nodes.append(helper.make_node("Add", [last, f"s{DEPTH - 1}"], ["y"], name="join"))
    shape = ["n", WIDTH]
    graph = helper.make_graph(
        nodes, "chain", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return OnnxTensors(path, {"x": np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)})


@pytest.mark.parametrize("layer", [0, 1, 17, DEPTH - 1])
def test_the_planted_fault_is_found_in_few_steps(tmp_path, layer):
    sound, faulty = chain(tmp_path / "sound.onnx"), chain(tmp_path / "faulty.onnx", layer)
    asked = []
    found = first_divergence(faulty, sound, bound=BOUND, advance=asked.append)
    assert (found.tensor, found.node, found.op) == (f"m{layer}", f"MatMul.{layer}", "MatMul")
    assert found.reads == ((f"t{layer - 1}",) if layer else ())
    assert found.runs <= 5
    assert len(asked) == len(set(asked)) < 40  # of 121 tensors
    assert found.nmse > BOUND
    assert found.cosine < 1
    assert found.quantiles[1.0] > found.quantiles[0.5] >= 0  # one column of eight is wrong
    assert f"first differs at m{layer}, computed by MatMul MatMul.{layer}" in found.line()


def test_one_tensor_at_a_time_is_halving(tmp_path):
    sound, faulty = chain(tmp_path / "sound.onnx"), chain(tmp_path / "faulty.onnx", 17)
    asked = []
    found = first_divergence(faulty, sound, bound=BOUND, at_once=1, advance=asked.append)
    assert found.tensor == "m17"
    assert len(asked) < 16


def test_equal_models_do_not_diverge(tmp_path):
    sound = chain(tmp_path / "sound.onnx")
    assert first_divergence(sound, chain(tmp_path / "same.onnx"), bound=BOUND) is None


def test_what_the_other_side_does_not_have_is_passed_over(tmp_path):
    sound, faulty = chain(tmp_path / "sound.onnx"), chain(tmp_path / "faulty.onnx", 17)
    common = ["m3", "t9", "t16", "t20", "t30", "y"]
    found = first_divergence(faulty, sound, bound=BOUND, common=common)
    assert found.tensor == "t20"  # the first of those behind the fault
    assert found.reads == ("t16",)


def test_any_callable_may_be_the_reference(tmp_path):
    sound, faulty = chain(tmp_path / "sound.onnx"), chain(tmp_path / "faulty.onnx", 5)
    found = first_divergence(faulty, lambda names: sound(names), bound=BOUND)
    assert found.tensor == "m5"


def test_a_fault_that_vanishes_on_one_way_is_still_the_first(tmp_path):
    """Of a := x + shift, b := a * 0, y := b + a: b in the middle is right, and clears a, until y is confirmed."""

    def model(name, shift):
        values = [numpy_helper.from_array(np.float32(shift), "shift"), numpy_helper.from_array(np.float32(0), "zero")]
        nodes = [
            helper.make_node("Add", ["x", "shift"], ["a"]),
            helper.make_node("Mul", ["a", "zero"], ["b"]),
            helper.make_node("Add", ["b", "a"], ["y"]),
        ]
        info = [helper.make_tensor_value_info(each, TensorProto.FLOAT, [4]) for each in "xy"]
        graph = helper.make_graph(nodes, "g", info[:1], info[1:], values)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / name)
        return OnnxTensors(tmp_path / name, {"x": np.arange(4, dtype=np.float32)})

    asked = []
    found = first_divergence(
        model("faulty.onnx", 3.0), model("sound.onnx", 1.0), bound=BOUND, at_once=1, advance=asked.append
    )
    assert asked == ["y", "b", "a"]
    assert found.tensor == "a"


def test_one_changed_code_of_a_package_is_found(package, copy_of):
    edited = copy_of(package)
    model = onnx.load(edited / "model.onnx")
    name = "transformer_blocks.1.ff.net.2.codes"
    codes = next(each for each in model.graph.initializer if each.name == name)
    codes.raw_data = bytes([codes.raw_data[0] ^ 0x77]) + codes.raw_data[1:]
    onnx.save(model, edited / "model.onnx")
    generator = np.random.default_rng(0)
    shapes = {"hidden_states": (2, 1, 8, 8), "encoder_hidden_states": (2, 6, 16)}
    inputs = {each: generator.standard_normal(shape, np.float32) for each, shape in shapes.items()}
    inputs |= {"timestep": np.array([10, 500], np.float32), "encoder_attention_mask": np.ones((2, 6), np.float32)}
    found = first_divergence(
        OnnxTensors(edited / "model.onnx", inputs), OnnxTensors(package / "model.onnx", inputs), bound=1e-12
    )
    reader = next(node for node in model.graph.node if name in node.input)
    assert found.node == reader.name
    assert found.op == f"lrq.{reader.op_type}"
    assert found.runs < 8


def test_what_both_sides_have_no_number_for_is_no_error():
    got, expected = finite(np.array([-np.inf, np.nan, 1.0]), np.array([-np.inf, np.nan, 1.0]))
    assert np.array_equal(got, expected)
    got, expected = finite(np.array([np.inf, np.nan]), np.array([-np.inf, 0.0]))
    assert not np.isfinite(got).any()


def test_metrics_of_a_divergence():
    assert cosine([1, 0], [2, 0]) == 1.0
    assert cosine([1, 0], [0, 3]) == 0.0
    assert cosine([0, 0], [0, 0]) == 1.0
    assert cosine([1, np.nan], [1, 1]) == 0.0
    quantiles = error_quantiles([1.0, 1.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0])
    assert quantiles == {0.5: 0.0, 0.9: 2.0, 0.99: 2.0, 1.0: 2.0}
    assert error_quantiles([1.0, np.nan], [1.0, 1.0])[1.0] == np.inf


def test_a_divergence_is_replayed_by_polygraphy(tmp_path):
    pytest.importorskip("polygraphy", reason="needs polygraphy, of the extra rtx")
    sound, faulty = chain(tmp_path / "sound.onnx"), chain(tmp_path / "faulty.onnx", 17)
    found = first_divergence(faulty, sound, bound=BOUND)
    command = save_replay(tmp_path / "replay", found, faulty)
    with np.load(tmp_path / "replay/tensors.npz") as arrays:
        assert np.array_equal(arrays["inputs.x"], faulty.inputs["x"])
        assert np.array_equal(arrays["expected"], sound(["m17"])["m17"])
        assert np.array_equal(arrays["got"], found.got)
    assert replayed(command) == 1  # they differ
    assert replayed(save_replay(tmp_path / "sound", found, sound)) == 0


def replayed(command):
    words = shlex.split(command)
    assert words[0] == "polygraphy"
    program = Path(sys.executable).with_name("polygraphy")
    return subprocess.run([program, *words[1:]], capture_output=True, text=True).returncode
