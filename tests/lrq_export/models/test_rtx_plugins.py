"""NVIDIA's own parser makes every lrq node of every family a plugin of ours, and its builder an engine (no GPU)."""

from __future__ import annotations

import onnx
import pytest
import trt_build

from graphs.ops import detach_bodies, lrq_nodes
from graphs.passes import PIPELINE, target_passes
from lrq_export.models.base import SAMPLES
from lrq_export.onnx_file import write_model
from lrq_export.plugins import find_library
from lrq_export.trace import trace

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install lrq-export[rtx]")
pytestmark = pytest.mark.rtx
rtx = pytest.importorskip("rtx")


@pytest.fixture(scope="module", autouse=True)
def registry(tmp_path_factory):
    library = find_library()
    if library is None:
        trt_build.skip_if_missing()
        library = trt_build.build_library(tmp_path_factory.mktemp("library"), trt_build.all_headers()[0])
    rtx.name_without_version(tmp_path_factory.mktemp("name"))
    with rtx.loaded(library) as registry:
        yield registry


@pytest.fixture(scope="module", params=["PixArt", "DiT", "FLUX", "SD3", "SD3.5", "Wan"])
def model(request, tiny_models):
    return tiny_models[request.param]


@pytest.fixture(scope="module")
def rewritten(model, tiny):
    traced = trace(model.family, model.config, model.plans(tiny.recipe()))
    for rewrite in PIPELINE:
        rewrite(traced)
    return traced


def written(traced, folder, **options) -> onnx.ModelProto:
    write_model(folder / "model.onnx", traced.to_onnx(), rtx.random_weights(traced), **options)
    return onnx.load(folder / "model.onnx")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def activations(request):
    return request.param


@pytest.fixture
def for_tensorrt(rewritten, activations, tmp_path) -> onnx.ModelProto:
    lowered = rewritten.copy()
    for rewrite in target_passes("tensorrt", activations):
        rewrite(lowered)
    return written(lowered, tmp_path, complete=detach_bodies)


def size_range(model, extent: int | str) -> tuple[int, int, int]:
    """The least, usual and largest size of an axis: all free ones are dynamic."""
    if isinstance(extent, int):
        return extent, extent, extent
    if extent == SAMPLES:
        return 1, 2, 4
    unit = max(spec.unit(extent) for spec in model.specs.values() if extent in spec.shape)
    return 2 * unit, model.sizes[extent], 2 * model.sizes[extent]


TYPES = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "bfloat16": trt.DataType.BF16}


def check_types(parsed, element):
    """Plugins and attention compute in the type that was asked for; who uses the engine sees float32 alone."""
    for layer in parsed.layers(trt.LayerType.PLUGIN_V3):
        assert (layer.get_input(0).dtype, layer.get_output(0).dtype) == (element, element), layer.name
    softmaxes = parsed.layers(trt.LayerType.SOFTMAX)
    assert softmaxes
    assert {layer.get_output(0).dtype for layer in softmaxes} == {element}
    outputs = [parsed.network.get_output(index) for index in range(parsed.network.num_outputs)]
    assert {tensor.dtype for tensor in outputs} == {trt.DataType.FLOAT}
    assert not {tensor.dtype for tensor in parsed.inputs()} & {trt.DataType.HALF, trt.DataType.BF16}


def test_every_node_becomes_a_plugin_and_an_engine_of_dynamic_sizes_builds(model, for_tensorrt, activations):
    parsed = rtx.Parsed(for_tensorrt)
    assert parsed.taken, parsed.errors
    assert parsed.plugins() == [node.name for node in lrq_nodes(for_tensorrt.graph.node)]
    assert len({node.op_type for node in lrq_nodes(for_tensorrt.graph.node)}) >= 3
    check_types(parsed, TYPES[activations])
    sizes = {name: [size_range(model, extent) for extent in spec.shape] for name, spec in model.specs.items()}
    engine = parsed.engine({name: tuple(zip(*ranges, strict=True)) for name, ranges in sizes.items()})
    assert all(tensor.raw_data in engine for tensor in for_tensorrt.graph.initializer if tensor.name.endswith(".codes"))


def test_plugins_win_over_the_bodies_of_model_onnx(rewritten, tmp_path):
    portable = written(rewritten, tmp_path)
    assert portable.functions
    parsed = rtx.Parsed(portable)
    assert parsed.taken, parsed.errors
    assert parsed.plugins() == [node.name for node in lrq_nodes(portable.graph.node)]
    assert not parsed.layers(trt.LayerType.DEQUANTIZE)
