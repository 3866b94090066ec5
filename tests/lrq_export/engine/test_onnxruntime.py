"""The ONNX Runtime engine: unsigned activations times signed weights, decoded ahead of time, exact."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from graphs.passes.patterns import ROTATE_OPS
from lrq_export.engine import onnxruntime as engine
from lrq_export.engine.onnxruntime import lower_linears, open_session, products_saturate
from lrq_export.loading import load
from lrq_export.machine import describe_machine
from lrq_export.quantized import QuantizedFile
from lrq_export.saved_graphs import rewritten_graph


@pytest.fixture(scope="module")
def model(package):
    return onnx.load(package / "engine/onnxruntime/model.onnx")


def test_every_layer_is_one_integer_product_and_siblings_share_their_codes(model):
    ops = Counter(node.op_type for node in model.graph.node)
    assert ops["MatMulIntegerToFloat"] == 20  # projections that were merged are products of their own again
    # One rotation per input of q, k, v and feed-forward; four attention outputs and the text are rotated in weights.
    rotations = sum(count for op, count in ops.items() if op in ROTATE_OPS)
    assert ops["ReduceMax"] == ops["QuantizeLinear"] == rotations + 5 == 13
    assert {node.op_type for node in model.graph.node if node.domain == "lrq"} <= set(ROTATE_OPS)


def test_weights_are_int8_and_nothing_is_packed(model):
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in types.values()) == 20
    assert not any(name.endswith((".codes", ".exponents")) for name in types)


def test_lowering_leaves_the_rewritten_graph_as_it_was(package):
    traced = rewritten_graph(package)
    before = traced.to_onnx().SerializeToString(deterministic=True)
    assert len(lower_linears(traced.copy())) == 20
    assert traced.to_onnx().SerializeToString(deterministic=True) == before


def test_one_layer_is_bit_exact_against_integers_in_numpy(package, model, tmp_path):
    """Cut the engine around one layer, feed it extreme tokens, and do the integer arithmetic by hand."""
    name = "transformer_blocks.0.ff.net.2"
    product = next(
        node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat" and node.input[1] == f"{name}.int8"
    )
    peak = next(node for node in model.graph.node if node.name == f"{name}.x.highest")
    last = next(node for node in model.graph.node if node.name == f"{name}.Bias")
    path, cut = tmp_path / "m.onnx", tmp_path / "cut.onnx"
    onnx.save(model, path)
    onnx.utils.extract_model(str(path), str(cut), [peak.input[0]], [last.output[0]], check_model=False)
    options = onnxruntime.SessionOptions()
    if products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(cut, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 6, 96)).astype(np.float32)
    x[0, 0], x[0, 1], x[0, 2], x[0, 3] = 0, 1e30, -1e-30, np.where(np.arange(96) % 2, 127, -127)
    (got,) = session.run(None, {peak.input[0]: x})

    file = QuantizedFile(package / "quantized.safetensors")
    layer, bias = file.layer(name), file.read(file.records[name].bias).numpy()
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
    codes = np.rint(x / scale).astype(np.int32)
    exact = codes @ layer.integer_weight().numpy().astype(np.int32).T
    wanted = exact.astype(np.float32) * layer.scale.numpy() * scale + bias
    assert codes.min() == -127
    assert product.input[0]
    np.testing.assert_allclose(got, wanted, rtol=3e-7, atol=0)


def test_all_zero_inputs_give_finite_answers(package):
    drop_in = load(package)
    zeros = {
        "hidden_states": torch.zeros(1, 1, 8, 8),
        "encoder_hidden_states": torch.zeros(1, 6, 16),
        "timestep": torch.zeros(1),
    }
    assert torch.isfinite(drop_in(**zeros).sample).all()


def test_a_session_takes_its_threads_from_the_caller(package):
    session = open_session(package / "engine/onnxruntime", threads=1)
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_providers()[-1] == "CPUExecutionProvider"


@pytest.mark.parametrize("saturate", [True, False])
def test_exact_products_are_asked_for_where_the_processor_s_own_saturate(package, monkeypatch, saturate):
    monkeypatch.setattr(engine, "products_saturate", lambda: saturate)
    options = open_session(package / "engine/onnxruntime").get_session_options()
    if saturate:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")


def test_the_processor_s_features_say_whether_products_saturate():
    """VNNI and its kin sum in 32 bits; x86 without them sums pairs in 16. Other processors are only asked."""
    features = set(describe_machine()["features"])
    if "avx2" in features:
        assert products_saturate() == features.isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"})
    else:
        assert products_saturate() in (True, False)
