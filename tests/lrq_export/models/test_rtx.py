"""NVIDIA's own parser and builder take the whole graph of every family, our plugins absent (no GPU needed).

The parser gives the layer of a DequantizeLinear the very name of its node, and refuses a name that it has seen. So a
body that begins with one is imported once; a graph with more layers goes in with its bodies in their places.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from graphs import names
from graphs.ops import detach_bodies, lrq_nodes
from graphs.passes import PIPELINE
from lrq_export.bind import assemble, quantize_layers, write_portable, write_standard
from lrq_export.checkpoint import open_checkpoint
from lrq_export.engine.tensorrt import lower
from lrq_export.models.base import SAMPLES
from lrq_export.quantized import QuantizedFile
from lrq_export.trace import trace

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install lrq-export[rtx]")
pytestmark = pytest.mark.rtx


class Uncalibrated:
    """Stands for what calibration observes: all channels of a layer's input alike, and nothing to correct."""

    def __init__(self, plans):
        self.width, self.statistics = {plan.name: plan.cols for plan in plans}, self

    def layer(self, name):
        return SimpleNamespace(mean=torch.zeros(self.width[name]), second_moment=torch.ones(self.width[name]))

    def tokens(self, name):
        return torch.eye(self.width[name])

    def correlation(self, name):
        return None


@pytest.fixture(scope="module", params=["PixArt", "DiT", "FLUX", "SD3", "SD3.5", "Wan"])
def model(request, tiny_models):
    return tiny_models[request.param]


@pytest.fixture(scope="module")
def rewritten(model, tiny):
    traced = trace(model.family, model.config, model.plans(tiny.recipe()))
    for rewrite in PIPELINE:
        rewrite(traced)
    return traced


@pytest.fixture(scope="module")
def quantized(model, rewritten, tiny, tmp_path_factory) -> QuantizedFile:
    """The weights of a random model."""
    folder = tmp_path_factory.mktemp("bound")
    model.new().save_pretrained(folder / "model")
    plans = model.plans(tiny.recipe())
    quantize_layers(rewritten, plans, open_checkpoint(folder / "model"), Uncalibrated(plans), folder)
    assemble(rewritten, folder, folder / "quantized.safetensors")
    return QuantizedFile(folder / "quantized.safetensors")


@pytest.fixture(scope="module")
def portable(rewritten, quantized, tmp_path_factory) -> onnx.ModelProto:
    """What a package holds as model.onnx."""
    path = tmp_path_factory.mktemp("portable") / "model.onnx"
    write_portable(rewritten, quantized, path)
    return onnx.load(path)


@pytest.fixture(scope="module")
def standard(rewritten, quantized, tmp_path_factory) -> onnx.ModelProto:
    """The same in standard ops alone."""
    return standard_ops(rewritten, quantized, tmp_path_factory.mktemp("standard") / "model.onnx")


def standard_ops(traced, quantized, path) -> onnx.ModelProto:
    write_standard(traced, quantized, path)
    return onnx.load(path)


class Parsed:
    """A model in TensorRT's parser. `errors`: the op of each node that it refused, and why; none if it took the model.

    The network needs the logger, builder and parser alive.
    """

    def __init__(self, model: onnx.ModelProto):
        self.logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, self.logger)
        taken = self.parser.parse(model.SerializeToString())
        errors = [self.parser.get_error(index) for index in range(self.parser.num_errors)]
        self.errors = [(error.node_operator(), error.desc()) for error in errors]
        assert taken == (not self.errors)

    def layers(self, kind=None) -> list:
        found = map(self.network.get_layer, range(self.network.num_layers))
        return [layer for layer in found if kind in (None, layer.type)]

    def inputs(self) -> list:
        return [self.network.get_input(index) for index in range(self.network.num_inputs)]


@pytest.fixture(scope="module")
def parsed(standard):
    return Parsed(standard)


def test_every_node_is_imported_and_none_by_a_plugin(parsed, portable):
    assert len({node.op_type for node in lrq_nodes(portable.graph.node)}) >= 4
    assert parsed.errors == []
    assert len(parsed.layers()) > len(portable.graph.node)
    plugins = [kind for name, kind in trt.LayerType.__members__.items() if name.startswith("PLUGIN")]
    assert plugins
    assert not [layer.name for kind in plugins for layer in parsed.layers(kind)]


def test_sizes_stay_dynamic(parsed, model):
    wanted = {name: tuple(-1 if isinstance(size, str) else size for size in spec.shape)
              for name, spec in model.specs.items()}  # fmt: skip
    assert {tensor.name: tuple(tensor.shape) for tensor in parsed.inputs()} == wanted
    assert any(-1 in shape[1:] for shape in wanted.values()) or model.class_name == "DiTTransformer2DModel"


def test_every_weight_enters_as_packed_codes_of_four_bits(parsed, rewritten):
    """They stay so in the engine: tests/graphs/ops/test_rtx.py measures that, at widths that outweigh its kernels."""
    dequantized = [layer.get_input(0) for layer in parsed.layers(trt.LayerType.DEQUANTIZE)]
    held = sorted(math.prod(tensor.shape) for tensor in dequantized if tensor.dtype == trt.DataType.INT4)
    wanted = sorted(math.prod(rewritten.expression(codes).shape) for codes in rewritten.codes_inputs())
    assert held == wanted


def size_range(model, extent: int | str) -> tuple[int, int, int]:
    """The least, usual and largest size of an axis: all free ones are dynamic."""
    if isinstance(extent, int):
        return extent, extent, extent
    if extent == SAMPLES:
        return 1, 2, 4
    unit = max(spec.unit(extent) for spec in model.specs.values() if extent in spec.shape)
    return 2 * unit, model.sizes[extent], 2 * model.sizes[extent]


def test_an_engine_of_dynamic_sizes_builds(parsed, model, portable):
    config, profile = parsed.builder.create_builder_config(), parsed.builder.create_optimization_profile()
    for tensor in parsed.inputs():
        ranges = [size_range(model, extent) for extent in model.specs[tensor.name].shape]
        profile.set_shape(tensor.name, *zip(*ranges, strict=True))
    config.add_optimization_profile(profile)
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    assert engine is not None
    assert engine.nbytes > sum(len(tensor.raw_data) for tensor in portable.graph.initializer)


@pytest.mark.parametrize(("activations", "element"), [("float16", "HALF"), ("bfloat16", "BF16")])
def test_bodies_compute_in_half_precision(rewritten, quantized, tmp_path, activations, element):
    """Of attention and of what is read and written."""
    model = standard_ops(lower(rewritten, False, activations), quantized, tmp_path / "model.onnx")
    parsed = Parsed(model)
    assert parsed.errors == []
    assert {layer.get_output(0).dtype for layer in parsed.layers(trt.LayerType.SOFTMAX)} == {
        getattr(trt.DataType, element)
    }
    assert parsed.network.get_output(0).dtype == trt.DataType.FLOAT


def test_the_plugins_are_absent(portable):
    """Without bodies nothing is left that could import our ops: else the tests above would not show who did."""
    bare = onnx.ModelProto()
    bare.CopyFrom(portable)
    ((op, reason), *_) = Parsed(detach_bodies(bare)).errors
    assert op == next(lrq_nodes(bare.graph.node)).op_type
    assert "Plugin not found" in reason


def test_an_op_that_tensorrt_does_not_import_would_be_seen(standard):
    """Else the first test would show nothing."""
    graph = gs.import_onnx(standard)
    timestep = next(tensor for tensor in graph.inputs if tensor.name == "timestep")
    (whole,) = graph.layer(op="Cast", inputs=[timestep], outputs=["whole"], attrs={"to": onnx.TensorProto.INT32})
    (flipped,) = graph.layer(op="BitwiseNot", inputs=[whole], outputs=["flipped"])
    flipped.dtype, flipped.shape = np.int32, timestep.shape
    graph.outputs.append(flipped)
    assert [op for op, _ in Parsed(gs.export_onnx(graph)).errors] == ["BitwiseNot"]


def test_a_body_with_codes_is_imported_once_only(portable):
    """A limit of the parser, and why `write_standard` is there. When this fails, model.onnx may go in as it is."""
    assert {function.domain for function in portable.functions} == {names.DOMAIN}
    ((_, reason), *_) = Parsed(portable).errors
    assert "[Dequantize]" in reason
    assert "already in use" in reason
