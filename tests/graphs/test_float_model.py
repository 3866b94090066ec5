import numpy as np
import onnx
import onnxruntime
import pytest

from graphs.float_model import float_model, float_name, weight_names
from graphs.ops.hadamard import hadamard_matrix
from graphs.passes import make_linear
from lrq_export.verify.metrics import nmse

TEXT = """
mlp (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    u = Linear<rows = 48, cols = 24>(x)
    a = Relu(u)
    b = Linear<rows = 48, cols = 48, codebook = 1, bias = 0>(a)
    v = Linear<rows = 24, cols = 48, bits = 8, bias = 0>(b)
    y = Rotate<block = 12>(v)
}
"""


@pytest.fixture(params=["open", "closed"])
def traced(request, parse):
    traced = parse(TEXT)
    if request.param == "closed":
        make_linear(traced)
    return traced


def test_inputs_are_the_model_s_own_and_the_weights(traced, weights):
    expressions = weight_names(traced)
    assert {name: each.source for name, each in expressions.items()} == {
        "u.codes.float": "u.weight", "b.codes.float": "b.weight", "v.codes.float": "v.weight",
        "u_bias": "u.bias",
    }  # fmt: skip
    model = float_model(traced)
    shapes = {each.name: tuple(dim.dim_value for dim in each.type.tensor_type.shape.dim) for each in model.graph.input}
    assert shapes.pop("x") == (0, 0, 24)
    assert shapes == {name: each.shape for name, each in expressions.items()}


def test_no_quantization_is_left_and_rotations_have_bodies(traced, weights):
    model = float_model(traced)
    lrq = [node.op_type for node in model.graph.node if node.domain == "lrq"]
    assert lrq == ["HadamardRotate"] == [function.name for function in model.functions]
    onnx.checker.check_model(model, full_check=True)


def test_weights_are_not_stored_and_the_traced_graph_stays(traced, weights):
    before = traced.to_onnx()
    fed = weights(traced)
    model = float_model(traced)
    assert traced.to_onnx() == before
    assert model.ByteSize() < sum(array.nbytes for array in fed.values()) + 10_000
    assert {each.name for each in model.graph.initializer}.isdisjoint(fed)


def test_it_computes_the_layers_in_floating_point(traced, weights):
    fed = weights(traced)
    session = onnxruntime.InferenceSession(float_model(traced).SerializeToString())
    x = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float32)
    (y,) = session.run(None, {"x": x} | fed)
    hidden = np.maximum(x @ fed[float_name("u.codes")].T + fed["u_bias"], 0) @ fed[float_name("b.codes")].T
    rotation = np.kron(np.eye(2), hadamard_matrix(12))
    assert nmse(y, hidden @ fed[float_name("v.codes")].T @ rotation) <= 1e-12


def test_a_fused_rotation_is_refused(parse, weights):
    traced = parse(TEXT)
    make_linear(traced)
    traced.graph.nodes[0].attrs |= {"rotation": "hadamard", "block": 12}
    with pytest.raises(ValueError, match="TwinLogLinear 'u': rotation 'hadamard' is fused, needed 'none'"):
        float_model(traced)
