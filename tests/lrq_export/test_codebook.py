"""`weights.method = "codebook"`, from the recipe to the engine: all rungs pass, a changed table entry breaks one."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from graphs.passes.patterns import ROTATE_OPS
from lrq_export.bind import quantize_layer
from lrq_export.checkpoint import TensorFile
from lrq_export.compiler import build
from lrq_export.errors import InputError
from lrq_export.models.pixart import PixArt
from lrq_export.package import load_manifest, save_tensors_atomic
from lrq_export.quant.weight import QuantizedWeight
from lrq_export.quantized import LayerRecord, QuantizedFile, write_quantized
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.source import open_source
from lrq_export.verify.ladder import run_session, run_torch
from lrq_export.verify.metrics import nmse
from lrq_export.verify.run import verify
from lrq_export.verify.subject import quantized_model

PRODUCT = "transformer_blocks.0.attn1.to_q+to_k+to_v"
GROUP_SIZE = 12
LAYERS = 10
PRODUCTS = 7  # q, k, v of the self-attention are one, and k and v of the cross-attention


@pytest.fixture(scope="module")
def built(tiny, tiny_transformer, tmp_path_factory):
    """A whole build of one block at 3 bits in groups."""
    folder = tmp_path_factory.mktemp("codebook")
    recipe = tiny.recipe(weights__method='"codebook"', weights__bits="3", weights__group_size=str(GROUP_SIZE))
    source = tiny_transformer(folder / "model", num_layers=1)
    return build(source, folder / "package", recipe=recipe, calibration=tiny.calibration)


@pytest.fixture(scope="module")
def package(built):
    return built.out


def test_every_rung_of_the_ladder_passes(built):
    assert built.passed
    rungs = {rung["rung"]: rung for rung in built.report["ladder"]}
    assert {name: rung["passed"] for name, rung in rungs.items()} == {
        "R0": True, "R1": None, "R2": True, "R3": True, "R4": True, "R5": None}  # fmt: skip
    assert all(rungs[name]["value"] <= 1e-6 for name in ("R0", "R2", "R3", "R4"))
    assert 0 < rungs["R1"]["value"] < 0.3
    assert all(0 < layer["output_nmse"] < 0.3 for layer in built.report["layers"])


def test_the_manifest_and_the_records_name_the_method(package):
    assert {layer["method"] for layer in load_manifest(package)["layers"].values()} == {"codebook"}
    assert {record.method for record in QuantizedFile(package / "quantized.safetensors").records.values()} == {
        "codebook"
    }


def test_the_graph_holds_tables_and_no_exponents(package):
    model = onnx.load(package / "model.onnx")
    nodes = [node for node in model.graph.node if node.domain == "lrq" and node.op_type not in ROTATE_OPS]
    assert len(nodes) == PRODUCTS
    assert {node.op_type for node in nodes} == {"CodebookLinear", "CodebookLinearResidual"}
    assert {node.op_type for node in nodes} <= {function.name for function in model.functions}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    file = QuantizedFile(package / "quantized.safetensors")
    assert set(file.file.entries) - set(file.float_names()) == {
        f"{name}.{role}" for name in file.records for role in ("codes", "table", "scale")
    }
    traced = rewritten_graph(package)
    for node in nodes:
        codes, table, scale, _ = (tensors[name] for name in node.input[1:5])
        layers = [file.layer(weight.layer) for weight in traced.linear_parts(codes.name)]
        assert (codes.data_type, table.data_type, scale.data_type) == (
            TensorProto.INT8, TensorProto.INT8, TensorProto.FLOAT)  # fmt: skip
        assert codes.raw_data == b"".join(layer.codes.numpy().tobytes() for layer in layers)
        tables = np.concatenate([layer.table.numpy() for layer in layers])
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(table), tables)
        rows = sum(layer.record.rows for layer in layers)
        assert list(table.dims) == [rows, layers[0].record.cols // GROUP_SIZE, 8]


def test_the_engine_multiplies_with_the_weights_that_tables_give(package):
    """Decoded here by hand: w = table[row, group, code]."""
    file = QuantizedFile(package / "quantized.safetensors")
    model = onnx.load(package / "engine/onnxruntime/model.onnx")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert not any(name.endswith((".codes", ".table")) for name in stored)
    for name, record in file.records.items():
        layer = file.layer(name)
        bits = np.unpackbits(layer.codes.numpy(), bitorder="little").reshape(record.rows, 3, -1)[:, :, : record.cols]
        codes = (bits * np.array([1, 2, 4]).reshape(1, 3, 1)).sum(1)
        row, col = np.indices(codes.shape)
        by_hand = layer.table.numpy()[row, col // GROUP_SIZE, codes]
        np.testing.assert_array_equal(stored[f"{name}.int8"].T, by_hand)
        np.testing.assert_array_equal(layer.integer_weight().numpy(), by_hand)


@pytest.fixture
def edited(package, copy_of, reseal):
    """Spoil the initializer of one layer in a copy of model.onnx, so that no hash tells."""

    def edit(role, change):
        folder = copy_of(package)
        path = folder / "model.onnx"
        model = onnx.load(path)
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{PRODUCT}.{role}")
        array = onnx.numpy_helper.to_array(tensor).copy()
        change(array)
        tensor.raw_data = array.tobytes()
        onnx.save(model, path)
        reseal(folder)
        return folder

    return edit


def flip_code(codes):
    """A weight of the first row at the largest level goes to the smallest: code 7 loses its bit in every plane."""
    largest = codes[0, 0] & codes[0, 1] & codes[0, 2]
    element = np.flatnonzero(largest)[0]
    codes[0, :, element] ^= largest[element] & -largest[element]


def move_level(table):
    """The largest level of the first row, which its largest weight has, becomes the smallest."""
    group = table[0, :, -1].argmax()
    table[0, group, -1] = -127


@pytest.mark.parametrize(("role", "change"), [("codes", flip_code), ("table", move_level)])
def test_a_perturbed_code_or_table_entry_breaks_r2(edited, role, change):
    report, _ = verify(edited(role, change))
    broken = [rung["rung"] for rung in report["ladder"] if rung["passed"] is False]
    assert broken == ["R2", "R4"]


def test_floating_point_activations_keep_the_dequantized_weight(tiny, tiny_transformer, tmp_path):
    """At 16 activation bits the product stays open, CodebookDequant in the portable graph and in the engine."""
    recipe = tiny.recipe(weights__method='"codebook"', activations__bits="16")
    source = open_source(tiny_transformer(tmp_path / "model", num_layers=1))
    calibration, out = tiny.calibration, tmp_path / "package"
    folder = build(source.checkpoint.path, out, recipe=recipe, calibration=calibration, until="engine").out
    inputs = TensorFile(calibration).read_all()
    quantized = quantized_model(PixArt(), source.config, QuantizedFile(folder / "quantized.safetensors"))
    wanted = run_torch(PixArt(), quantized, inputs).numpy()
    for name in ("model.onnx", "engine/onnxruntime/model.onnx"):
        nodes = onnx.load(folder / name).graph.node
        assert sum(node.op_type == "CodebookDequant" for node in nodes) == LAYERS
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        assert nmse(run_session(session, PixArt().inputs(source.config), inputs), wanted) <= 1e-9


# --- one layer


def record(bits=3, method="codebook", group_size=24):
    return LayerRecord("net.0", 16, 48, bits, group_size, 8, 0, None, "nothing", "a test", method=method)


@pytest.fixture
def weight():
    """Laplacian, one-sided in a third of its rows: far from any pair of twin levels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 48, generator=generator) * torch.rand(16, 48, generator=generator)
    weight[::3] = weight[::3].abs() + 1
    return weight


@pytest.fixture
def correlation():
    """E[x xᵀ] (48, 48) of correlated inputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    return x.T @ x / len(x)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_free_table_loses_less_than_twin_levels(weight, correlation, bits, compensated):
    given = correlation if compensated else None
    errors = {}
    for method in ("tlq", "codebook"):
        layer = quantize_layer(weight, correlation.diagonal(), record(bits, method), given)
        assert isinstance(layer, QuantizedWeight)
        error = layer.integer_weight() * layer.scale[:, None] - weight
        errors[method] = float((error @ correlation * error).sum())
    assert errors["codebook"] < errors["tlq"]


def test_compensated_codes_lose_less_output_than_the_nearest(weight, correlation):
    errors = []
    for given in (None, correlation):
        layer = quantize_layer(weight, correlation.diagonal(), record(), given)
        assert int(layer.codes.numel()) == 16 * 48 * 3 // 8
        error = layer.integer_weight() * layer.scale[:, None] - weight
        errors.append(float((error @ correlation * error).sum()))
    assert errors[1] < errors[0]


def test_at_8_bits_the_method_says_nothing(weight):
    layers = [quantize_layer(weight, None, record(8, method)) for method in ("tlq", "codebook")]
    assert [layer.record.roles() for layer in layers] == [("codes", "scale")] * 2
    assert torch.equal(layers[0].codes, layers[1].codes)


# --- records of other versions


@pytest.fixture
def twin_log_layers(weight, tmp_path):
    path = tmp_path / "quantized.safetensors"
    write_quantized(path, [quantize_layer(weight, None, record(method="tlq"))], {"net.0.bias": torch.ones(16)})
    return path


def rewritten_records(path, out, change):
    file = TensorFile(path)
    rows = json.loads(file.metadata["layers"])
    for row in rows:
        change(row)
    save_tensors_atomic(out, file.read_all(), file.metadata | {"layers": json.dumps(rows)})
    return out


def test_records_without_a_method_are_twin_log(twin_log_layers, tmp_path):
    """Packages written before there was a choice."""
    old = QuantizedFile(rewritten_records(twin_log_layers, tmp_path / "old", lambda row: row.pop("method")))
    new = QuantizedFile(twin_log_layers)
    assert {record.method for record in old.records.values()} == {"tlq"}
    assert torch.equal(old.layer("net.0").integer_weight(), new.layer("net.0").integer_weight())
    assert old.float_names() == new.float_names() == ["net.0.bias"]


def test_a_method_that_is_none_is_refused(twin_log_layers, tmp_path):
    path = rewritten_records(twin_log_layers, tmp_path / "odd", lambda row: row.update(method="magic"))
    with pytest.raises(InputError, match=r"net\.0: method 'magic', needed one of tlq, codebook"):
        QuantizedFile(path)
