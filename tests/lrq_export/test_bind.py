"""Quantizing one layer: errors it reports, and the bias that keeps its mean output. Binding: the codes in the file."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from graphs import names
from graphs.checks import check
from graphs.ops import packing
from graphs.ops.words import unpack_words
from graphs.passes import TARGETS, prepack
from graphs.passes.patterns import CODED_OPS, codes_form, is_lrq, operand
from lrq_export import bind
from lrq_export.bind import (
    moments_of,
    portable_weights,
    quantize_layer,
    write_for_plugins,
    write_portable,
    write_standard,
)
from lrq_export.calibrate.run import observe
from lrq_export.quant.bias_correction import corrected_bias
from lrq_export.quant.rotation import Rotation
from lrq_export.quant.weight import dequantize
from lrq_export.quantized import (
    FOLDED,
    ONLINE,
    UNROTATED,
    LayerRecord,
    QuantizedFile,
    as_bytes,
    write_quantized,
)
from lrq_export.saved_graphs import rewritten_graph

ROWS, COLS = 24, 48


def record(bits: int, group_size: int = COLS) -> LayerRecord:
    return LayerRecord("layer", ROWS, COLS, bits, group_size, 8, 0, None, UNROTATED, "test", [], "layer.bias")


@pytest.fixture
def weight():
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def inputs():
    """Inputs (tokens, cols) with a mean far from zero, as adaLN gives them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(500, COLS, generator=generator) + 3 * torch.randn(COLS, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_corrected_bias_keeps_the_mean_output(weight, inputs, bits):
    layer = quantize_layer(weight, None, record(bits))
    rounded = layer.integer_weight().float() * layer.scale[:, None]
    bias = torch.linspace(-1, 1, ROWS)
    exact = (inputs @ weight.T + bias).mean(0)
    corrected = corrected_bias(bias, weight - dequantize(layer), inputs.double().mean(0))
    torch.testing.assert_close((inputs @ rounded.T + corrected).mean(0), exact, atol=1e-4, rtol=0)


def test_without_the_correction_the_mean_output_moves(weight, inputs):
    layer = quantize_layer(weight, None, record(3))
    rounded = layer.integer_weight().float() * layer.scale[:, None]
    assert ((inputs @ rounded.T).mean(0) - (inputs @ weight.T).mean(0)).abs().max() > 1e-2


def test_the_record_states_the_measured_errors(weight):
    importance = torch.linspace(0.1, 4, COLS, dtype=torch.float64)
    layer = quantize_layer(weight, importance, record(4, group_size=16))
    error = (layer.integer_weight().double() * layer.scale.double()[:, None] - weight.double()).square()
    power = weight.double().square()
    assert layer.record.weight_nmse == pytest.approx(float(error.sum() / power.sum()), rel=1e-5)
    weighted = float((error @ importance).sum() / (power @ importance).sum())
    assert layer.record.weighted_nmse == pytest.approx(weighted, rel=1e-5)
    assert layer.record.weighted_nmse != layer.record.weight_nmse


@pytest.mark.parametrize("correlations", [True, False])
@pytest.mark.parametrize("rotated_by", [UNROTATED, ONLINE, FOLDED])
def test_moments_are_those_of_the_input_that_the_weight_is_rotated_for(inputs, rotated_by, correlations, tmp_path):
    class Family:
        def call(self, model, part):
            return model(part["hidden_states"])

    samples = {"hidden_states": inputs[:, None], "timestep": torch.zeros(len(inputs))}
    model = torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(COLS, ROWS)))
    observed = observe(Family(), model, ["layer"], samples, 64, tmp_path, correlations=correlations)
    rotation = None if rotated_by == UNROTATED else Rotation(COLS, 12, 3)
    seen = inputs if rotation is None else rotation.apply(inputs)
    block, seed = (0, None) if rotation is None else (12, 3)
    layer = LayerRecord("layer", ROWS, COLS, 4, COLS, 8, block, seed, rotated_by, "test", [], "layer.bias")
    mean, second_moment, correlation = moments_of(observed, layer)
    torch.testing.assert_close(mean.float(), seen.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second_moment.float(), seen.square().mean(0), atol=1e-3, rtol=1e-4)
    if correlations:
        torch.testing.assert_close(correlation.float(), seen.T @ seen / len(seen), atol=1e-3, rtol=1e-3)
    else:
        assert correlation is None


@pytest.fixture
def rewritten(package):
    """The package's graph behind all passes."""
    return rewritten_graph(package)


@pytest.fixture(params=[2, 3, 4])
def of_bits(request, rewritten, package, tmp_path):
    """That graph and the package's weights, the codes cut to so many bits."""
    stored, bits = QuantizedFile(package / "quantized.safetensors"), request.param
    layers = []
    for layer in map(stored.layer, stored.records):
        codes = packing.unpack(layer.packed()) & ((1 << bits) - 1)
        record = replace(layer.record, bits=bits)
        layers.append(replace(layer, record=record, codes=as_bytes(packing.pack(codes, bits))))
    path = tmp_path / "quantized.safetensors"
    write_quantized(path, layers, {name: stored.read(name) for name in stored.float_names()})
    for name, weight in rewritten.linears.items():
        rewritten.linears[name] = replace(weight, bits=bits)
    for node in rewritten.graph.nodes:
        if is_lrq(node, *CODED_OPS):
            node.attrs["bits"], codes = bits, operand(node, "codes")
            codes.dtype, codes.shape = codes_form(node)
    check(rewritten)
    return rewritten, QuantizedFile(path)


@pytest.mark.parametrize("in_words", [False, True])
def test_the_graph_says_what_the_file_will_hold(of_bits, in_words):
    traced, quantized = of_bits
    if in_words:
        prepack(traced)
    model = onnx.shape_inference.infer_shapes(traced.to_onnx())
    said = {value.name: value.type.tensor_type for value in model.graph.input}
    weights = list(portable_weights(traced, quantized))
    assert {weight.name for weight in weights} == said.keys() - {each.name for each in traced.model_inputs()}
    for weight in weights:
        shape = tuple(dim.dim_value for dim in said[weight.name].shape.dim)
        assert (weight.name, said[weight.name].elem_type, shape) == (weight.name, weight.onnx_type, weight.shape)
        assert len(weight.read()) == weight.size


def test_four_bit_codes_of_a_package_are_int4_in_graph_and_file(rewritten, package):
    said = {value.name: value.type.tensor_type.elem_type for value in rewritten.to_onnx().graph.input}
    held = {each.name: each.data_type for each in onnx.load(package / "model.onnx").graph.initializer}
    for name in rewritten.codes_inputs():
        assert said[name] == held[name] == onnx.TensorProto.INT4


@pytest.mark.parametrize("inline_limit", [0, 1 << 30])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime-trt"])
def test_a_prepacked_file_holds_the_codes_of_the_portable_one_bit_for_bit(of_bits, target, inline_limit, tmp_path):
    traced, quantized = of_bits
    write_portable(traced, quantized, tmp_path / "portable.onnx")
    portable = {each.name: each for each in onnx.load(tmp_path / "portable.onnx").graph.initializer}
    for step in TARGETS[target]:
        assert step(traced).fired
    write_for_plugins(traced, quantized, tmp_path / "m.onnx", inline_limit=inline_limit)
    model = onnx.load(tmp_path / "m.onnx")
    assert not model.functions
    held = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    readers = [node for node in model.graph.node if node.op_type in CODED_OPS]
    assert len(readers) == len(traced.codes_inputs())
    for node in readers:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        assert attributes["layout"] == names.WORDS.encode()
        bits, cols = attributes["bits"], attributes["cols"]
        codes = unpack_words(held[node.input[1]], bits, cols)
        assert packing.pack(codes, bits) == packing.from_tensor(portable[node.input[1]], bits, cols)
    for name in portable.keys() - {node.input[1] for node in readers}:
        np.testing.assert_array_equal(held[name], onnx.numpy_helper.to_array(portable[name]))


@pytest.mark.parametrize("inline_limit", [0, 1 << 30])
def test_in_standard_ops_alone_the_model_answers_the_same(of_bits, inline_limit, tmp_path):
    traced, quantized = of_bits
    write_portable(traced, quantized, tmp_path / "portable.onnx", inline_limit=inline_limit)
    write_standard(traced, quantized, tmp_path / "standard.onnx", inline_limit=inline_limit)
    standard = onnx.load(tmp_path / "standard.onnx", load_external_data=False)
    onnx.checker.check_model(tmp_path / "standard.onnx", full_check=True)
    assert not standard.functions
    assert {entry.domain for entry in standard.opset_import} == {node.domain for node in standard.graph.node} == {""}
    sizes, answers = {"height": 8, "width": 12, "text": 5}, []
    options = onnxruntime.SessionOptions()  # what an optimizer fuses differs by names, and with it the last bit
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name in ("portable", "standard"):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        shapes = {
            each.name: [size if isinstance(size, int) else sizes.get(size, 2) for size in each.shape]
            for each in session.get_inputs()
        }
        rng = np.random.default_rng(0)
        feeds = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        answers.append(session.run(None, feeds)[0])
    assert answers[0].std() > 0
    np.testing.assert_array_equal(*answers)


def test_codes_in_another_layout_than_the_graph_asks_for_reach_no_file(of_bits, tmp_path, monkeypatch):
    """The twin that must fail: in whole words of 2 or 4 bits even the bytes would be as many."""
    traced, quantized = of_bits
    prepack(traced)
    monkeypatch.setattr(bind, "_layout", lambda traced, codes: names.STORAGE)
    with pytest.raises(ValueError, match=r"codes: the graph's input has shape \(\d+, \d+\), its weight \(\d+, \d, "):
        write_for_plugins(traced, quantized, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_words_of_a_layer_hold_its_codes(weight, bits):
    layer = quantize_layer(weight[:, :37], None, replace(record(bits), cols=37, group_size=37))
    words = layer.onnx_weights(names.WORDS)[0]
    array = np.frombuffer(words.read(), np.int8).reshape(words.shape)
    np.testing.assert_array_equal(unpack_words(array, bits, 37), packing.unpack(layer.packed()))


def test_plain_integers_know_no_layout(weight):
    layer = quantize_layer(weight, None, record(8))
    in_words, stored = (layer.onnx_weights(layout)[0] for layout in (names.WORDS, names.STORAGE))
    assert in_words.shape == stored.shape == (ROWS, COLS)
    assert in_words.read() == stored.read() == layer.codes.numpy().tobytes()
