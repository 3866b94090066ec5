"""model.onnx: portable as one file, or with its weights beside it; a wrong announcement never reaches the disk."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from lrq_export.loading import load
from lrq_export.onnx_file import ALIGNMENT, WeightTensor, write_model

BLOCKED = ("torch", "lrq_export", "graphs", "onnx", "diffusers", "safetensors")
ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
import numpy
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
fed = dict(numpy.load(sys.argv[2]))
numpy.save(sys.argv[3], session.run(None, fed)[0])
assert not any(name.partition(".")[0] in BLOCKED for name in sys.modules)
"""


def test_a_stock_runtime_with_nothing_but_numpy_gives_the_same_answer(package, tmp_path):
    rng = np.random.default_rng(0)
    fed = {
        "hidden_states": rng.standard_normal((2, 1, 8, 12)), "timestep": np.array([700.0, 20.0]),
        "encoder_hidden_states": rng.standard_normal((2, 3, 16)),
        "encoder_attention_mask": np.array([[1, 1, 0], [1, 1, 1]]),
    }  # fmt: skip
    fed = {name: array.astype(np.float32) for name, array in fed.items()}
    np.savez(tmp_path / "in.npz", **fed)
    code = ALONE.replace("BLOCKED", repr(BLOCKED))
    # A folder of its own: neither this repository nor an editable install's path hooks matter to the blocked names.
    arguments = [sys.executable, "-c", code, package / "model.onnx", tmp_path / "in.npz", tmp_path / "out.npy"]
    subprocess.run(arguments, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, timeout=120)
    got = np.load(tmp_path / "out.npy")
    here = onnxruntime.InferenceSession(package / "model.onnx", providers=["CPUExecutionProvider"]).run(None, fed)[0]
    np.testing.assert_array_equal(got, here)
    engine = load(package)(**{name: torch.from_numpy(array) for name, array in fed.items()}, return_dict=False)[
        0
    ].numpy()
    assert np.square(got - engine).sum() <= 1e-4 * np.square(engine).sum()


def weighted_sum(shapes):
    """y = x + sum of the weights, each a graph input."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])]
    inputs += [helper.make_tensor_value_info(f"w{i}", TensorProto.FLOAT, list(shape)) for i, shape in enumerate(shapes)]
    nodes = [helper.make_node("ReduceSum", [f"w{i}"], [f"s{i}"], keepdims=0) for i in range(len(shapes))]
    nodes.append(helper.make_node("Sum", ["x", *(f"s{i}" for i in range(len(shapes)))], ["y"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])]
    graph = helper.make_graph(nodes, "sums", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


@settings(max_examples=25, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(1, 40), max_size=2), min_size=1, max_size=4), external=st.booleans())
def test_a_model_answers_the_same_with_its_weights_inside_and_beside(tmp_path_factory, shapes, external):
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    weights = [WeightTensor.of(f"w{i}", array) for i, array in enumerate(arrays)]
    total = write_model(path, weighted_sum(shapes), weights, inline_limit=0 if external else 1 << 30)
    assert total == sum(array.nbytes for array in arrays)
    assert path.with_name("m.onnx.data").exists() == external
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"]
    (got,) = session.run(None, {"x": np.zeros(3, np.float32)})
    np.testing.assert_allclose(got, sum(array.sum() for array in arrays), atol=1e-3)


def test_external_tensors_start_where_they_can_be_mapped(tmp_path):
    arrays = [np.ones((3, n), np.float32) for n in (1, 5000, 7)]
    weights = [WeightTensor.of(f"w{i}", array) for i, array in enumerate(arrays)]
    write_model(tmp_path / "m.onnx", weighted_sum([array.shape for array in arrays]), weights, inline_limit=0)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        assert facts["location"] == "m.onnx.data"
        assert int(facts["offset"]) % ALIGNMENT == 0


def test_two_graphs_may_share_the_file_of_their_weights(tmp_path):
    model, arrays = weighted_sum([(5, 3), (7, 1)]), [np.full((5, 3), 2, np.float32), np.ones((7, 1), np.float32)]
    weights = [WeightTensor.of(f"w{i}", array) for i, array in enumerate(arrays)]
    write_model(tmp_path / "m.onnx", model, weights, inline_limit=0)
    before = (tmp_path / "m.onnx.data").stat()
    unreadable = [replace(weight, read=None) for weight in weights]
    write_model(tmp_path / "other.onnx", model, unreadable, inline_limit=0, data=tmp_path / "m.onnx.data")
    assert (tmp_path / "m.onnx.data").stat() == before
    assert onnx.load(tmp_path / "other.onnx") == onnx.load(tmp_path / "m.onnx")


def test_a_package_past_the_limit_streams_into_external_data(package, tmp_path):
    from lrq_export.bind import write_portable
    from lrq_export.quantized import QuantizedFile
    from lrq_export.saved_graphs import rewritten_graph

    total = write_portable(
        rewritten_graph(package),
        QuantizedFile(package / "quantized.safetensors"),
        tmp_path / "model.onnx",
        inline_limit=0,
    )
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size >= total
    assert (tmp_path / "model.onnx").stat().st_size < (package / "model.onnx").stat().st_size - total // 2
    fed = {
        "hidden_states": np.ones((1, 1, 4, 4), np.float32), "timestep": np.ones(1, np.float32),
        "encoder_hidden_states": np.ones((1, 2, 16), np.float32), "encoder_attention_mask": np.ones((1, 2), np.float32),
    }  # fmt: skip
    answers = [
        onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]).run(None, fed)[0]
        for folder in (package, tmp_path)
    ]
    np.testing.assert_array_equal(*answers)


def test_a_weight_that_is_not_what_it_announced_leaves_no_file(tmp_path):
    lying = WeightTensor("w0", TensorProto.FLOAT, (2,), 8, lambda: b"1234")
    for limit in (0, 1 << 30):
        with pytest.raises(ValueError, match="4 bytes, announced 8"):
            write_model(tmp_path / "m.onnx", weighted_sum([(2,)]), [lying], inline_limit=limit)
    with pytest.raises(ValueError, match="no input"):
        write_model(tmp_path / "m.onnx", weighted_sum([(2,)]), [WeightTensor.of("other", np.ones(2, np.float32))])
    assert list(tmp_path.iterdir()) == []


def test_a_weight_of_another_shape_than_the_graph_says_is_refused(tmp_path):
    """Codes of as many bytes in another layout would be read as other codes."""
    weights = [WeightTensor.of("w0", np.ones((3, 4), np.float32))]
    with pytest.raises(ValueError, match=r"w0: the graph's input has shape \(3, 1, 4\), its weight \(3, 4\)"):
        write_model(tmp_path / "m.onnx", weighted_sum([(3, 1, 4)]), weights)
    assert list(tmp_path.iterdir()) == []


def test_the_session_file_holds_what_makes_the_engine_exact(package):
    settings = json.loads((package / "engine/onnxruntime/session.json").read_text())
    assert settings["config_where_products_saturate"]["session.x64quantprecision"] == "1"
    assert "CPUExecutionProvider" in settings["providers"]
