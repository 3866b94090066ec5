"""Weights inside an ONNX file are compared byte for byte with what was meant to be there."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lrq_export.onnx_file import WeightTensor, write_model
from lrq_export.verify.bound import differing_weight


@pytest.fixture(params=[1 << 30, 0], ids=["inside the file", "external data"])
def written(request, tmp_path):
    """A model of two weights, and what its weights should be."""
    rng = np.random.default_rng(0)
    arrays = {"a": rng.integers(-8, 8, (64, 64)).astype(np.int8), "b": rng.random(5, np.float32)}
    types = {"a": TensorProto.INT8, "b": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, types[name], array.shape) for name, array in arrays.items()]
    outputs = [helper.make_tensor_value_info(f"{name}_out", types[name], each.shape) for name, each in arrays.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in arrays]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 21)]
    )
    path = tmp_path / "model.onnx"
    write_model(path, model, [WeightTensor.of(*item) for item in arrays.items()], inline_limit=request.param)
    return path, arrays


def test_what_was_written_is_found_again(written):
    path, arrays = written
    assert differing_weight(path, [WeightTensor.of(*item) for item in arrays.items()]) is None


def test_one_changed_code_of_many_is_named(written):
    path, arrays = written
    arrays["a"][63, 63] ^= 1
    assert differing_weight(path, [WeightTensor.of(*item) for item in arrays.items()]) == "a"


def test_a_weight_of_another_type_or_name_is_named(written):
    path, arrays = written
    assert differing_weight(path, [WeightTensor.of("b", arrays["b"].astype(np.float64))]) == "b"
    assert differing_weight(path, [WeightTensor.of("c", arrays["b"])]) == "c"
    assert {tensor.name for tensor in onnx.load(path).graph.initializer} == {"a", "b"}
