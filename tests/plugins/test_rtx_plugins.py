"""NVIDIA's own parser takes every lrq node as a plugin of ours, and its builder keeps the weights packed (no GPU)."""

from __future__ import annotations

import json
import math

import golden
import numpy as np
import onnx
import pytest
import trt_build
from onnx import helper, numpy_helper

from graphs import names
from graphs.ops import OPS, attach_bodies, detach_bodies, lrq_nodes, packing, words
from graphs.ops.codebook_dequant import random_table
from graphs.ops.coded_weight import random_codes
from graphs.ops.spec import Example
from graphs.ops.twin_log_dequant import random_exponents
from graphs.passes import PIPELINE, TARGETS
from lrq_export.models import family_of
from lrq_export.onnx_file import write_model
from lrq_export.plan import plan_layers
from lrq_export.plugins import find_library
from lrq_export.recipe import load_recipe
from lrq_export.trace import trace

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install lrq-export[rtx]")
pytestmark = pytest.mark.rtx
rtx = pytest.importorskip("rtx")

DEMO = trt_build.ROOT / "examples" / "digits-pixart" / "config.json"
TOKENS = ("x", "residual")
MOST_BITS = {4: 4.7, 3: 3.7, 2: 2.7}  # of an engine for a weight, all it stores with the codes included


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The one that was built, or one whose kernels are CPU loops: none of them is called here."""
    built = find_library()
    if built is not None:
        return built
    trt_build.skip_if_missing()
    return trt_build.build_library(tmp_path_factory.mktemp("library"), trt_build.all_headers()[0])


@pytest.fixture(scope="module", autouse=True)
def registry(library, tmp_path_factory):
    rtx.name_without_version(tmp_path_factory.mktemp("name"))
    with rtx.loaded(library) as registry:
        yield registry


def one_node(spec, example, *, bodies=False):
    """A model of one node; its tokens are inputs whose leading sizes are free, the rest are initializers."""
    arrays = dict(zip([tensor.name for tensor in spec.inputs], example.inputs, strict=True))
    held = {name: numpy_helper.from_array(array, name) for name, array in arrays.items()}
    inputs = [
        helper.make_tensor_value_info(name, tokens.data_type, [*map(str, range(len(tokens.dims) - 1)), tokens.dims[-1]])
        for name, tokens in held.items()
        if name in TOKENS
    ]
    element = inputs[0].type.tensor_type.elem_type if inputs else onnx.TensorProto.FLOAT
    output = helper.make_tensor_value_info("out", element, None)
    node = spec.node(list(arrays), ["out"], name="node", **example.attributes)
    weights = [tensor for name, tensor in held.items() if name not in TOKENS]
    model = helper.make_model(
        helper.make_graph([node], "one_node", inputs, [output], weights),
        opset_imports=[helper.make_opsetid("", names.ONNX_OPSET), helper.make_opsetid(names.DOMAIN, names.OPSET)],
        ir_version=names.IR_VERSION,
    )
    return attach_bodies(model) if bodies else model


def sizes_of(spec, example):
    shapes = {tensor.name: array.shape for tensor, array in zip(spec.inputs, example.inputs, strict=True)}
    return {name: (shape, shape, shape) for name, shape in shapes.items()}


def test_every_creator_is_found(registry):
    found = {(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in registry.all_creators}
    assert {(name, names.PLUGIN_VERSION, names.PLUGIN_NAMESPACE) for name in OPS} <= found


def odd_int4(example):
    """TensorRT refuses those: docs/graph.md."""
    return any(array.dtype.name == "int4" and array.size % 2 for array in example.inputs)


@pytest.mark.parametrize("name", OPS)
def test_every_node_becomes_a_plugin_and_builds(name):
    cases = [case for case in golden.all_cases() if case.spec.name == name and not odd_int4(case.example)]
    assert cases
    cases = cases[:: max(1, len(cases) // 12)]  # a builder takes a tenth of a second
    for case in cases:
        parsed = rtx.Parsed(one_node(case.spec, case.example))
        assert parsed.taken, (case.label, parsed.errors)
        assert parsed.plugins() == ["node"]
        assert parsed.layers(trt.LayerType.CONSTANT, trt.LayerType.PLUGIN_V3) == parsed.layers()
        last = case.spec.reference(*case.example.inputs, **case.example.attributes).shape[-1]
        assert parsed.network.get_output(0).shape[-1] == last
        parsed.engine(sizes_of(case.spec, case.example))


def first(name):
    return OPS[name].examples(np.random.default_rng(0))[0]


@pytest.mark.parametrize("name", OPS)
def test_the_plugin_wins_over_the_body(name):
    parsed = rtx.Parsed(one_node(OPS[name], first(name), bodies=True))
    assert parsed.taken, parsed.errors
    assert parsed.plugins() == ["node"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("HadamardRotate", {"block": 7}, "block 7"),
        ("TwinLogLinear", {"act_bits": 5}, "'act_bits': got 5, needed one of: 8, 6, 4"),
        ("TwinLogLinear", {"group_size": 5}, "group_size 5"),
        ("TwinLogLinear", {"rows": 9}, "codes has shape (6, 1, 24), needed (9, 1, 24)"),
        ("CodebookLinear", {"layout": "words"}, "input 'codes' has a type that the op does not take"),
        ("LayerNormRotate", {"epsilon": -1.0}, "epsilon"),
    ],
)
def test_a_bad_node_is_refused_with_a_message_and_the_process_lives(name, change, said):
    model = one_node(OPS[name], first(name))
    for attribute in model.graph.node[0].attribute:
        if attribute.name in change:
            attribute.CopyFrom(helper.make_attribute(attribute.name, change[attribute.name]))
    parsed = rtx.Parsed(model)
    if parsed.taken:  # refused by the builder then
        with pytest.raises(RuntimeError):
            parsed.engine(sizes_of(OPS[name], first(name)))
    assert any(message.startswith("lrq: ") and said in message for message in parsed.errors)


def large(name, bits, layout):
    rows, cols = 2048, 2048  # large enough for what an engine holds beside weights to be little
    rng = np.random.default_rng(bits)
    codes = random_codes(rng, bits, rows, cols)
    if layout == names.WORDS:
        codes = words.prepack(packing.unpack_elements(codes, bits, cols), bits)
    levels = (random_exponents if name.startswith("TwinLog") else random_table)(rng, rows, 1, bits)
    scale, bias = np.ones((2, rows), np.float32)
    attributes = {"bits": bits, "group_size": cols, "rows": rows, "cols": cols, "act_bits": 8, "layout": layout}
    return Example((np.ones((2, cols), np.float16), codes, levels, scale, bias), attributes)


@pytest.mark.parametrize("layout", [names.STORAGE, names.WORDS])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("name", ["TwinLogLinear", "CodebookLinear"])
def test_the_engine_keeps_the_codes_packed(name, bits, layout):
    example = large(name, bits, layout)
    engine = rtx.Parsed(one_node(OPS[name], example)).engine(sizes_of(OPS[name], example))
    assert 8 * len(engine) / (example.attributes["rows"] * example.attributes["cols"]) <= MOST_BITS[bits]


def test_a_widened_weight_would_be_seen():
    example = large("TwinLogLinear", 4, names.STORAGE)
    codes = np.zeros((2048, 2048), np.int8)
    int8 = Example((example.inputs[0], codes, *example.inputs[3:]), {"rows": 2048, "cols": 2048, "act_bits": 8})
    engine = rtx.Parsed(one_node(OPS["Int8Linear"], int8)).engine(sizes_of(OPS["Int8Linear"], int8))
    assert 8 * len(engine) / codes.size > MOST_BITS[4]


class Demo:
    """The demo's graph as the target `tensorrt` has it, its weights random."""

    def __init__(self, bits, folder):
        config = json.loads(DEMO.read_text())
        family = family_of(config["_class_name"])
        model = family.construct(config)
        recipe = load_recipe(overrides={"weights.bits": str(bits), "rotation.kind": "hadamard"})
        self.traced = trace(family, dict(model.config), plan_layers(model, family, recipe))
        for step in (*PIPELINE, *TARGETS["tensorrt"]):
            step(self.traced)
        weights = rtx.random_weights(self.traced)
        write_model(folder / "model.onnx", self.traced.to_onnx(), weights, complete=detach_bodies)
        self.model = onnx.load(folder / "model.onnx")

    def engine(self, model):
        parsed = rtx.Parsed(model)
        assert parsed.taken, parsed.errors
        free = {"height": (8, 16, 32), "width": (8, 16, 32)}
        ranges = {
            value.name: [
                free.get(dim.dim_param, (1, 2, 4)) if dim.dim_param else (dim.dim_value,) * 3
                for dim in value.type.tensor_type.shape.dim
            ]
            for value in model.graph.input
        }
        return parsed, parsed.engine({name: tuple(zip(*sizes, strict=True)) for name, sizes in ranges.items()})

    def sharing_weights(self):
        """The same graph, whose quantized layers of one shape all read the weights of the first. Beside it: how many
        weights are gone.
        """
        model, weights = onnx.ModelProto(), 0
        model.CopyFrom(self.model)
        held = {tensor.name: tensor for tensor in model.graph.initializer}
        shared: dict[tuple, str] = {}
        for node in lrq_nodes(model.graph.node):
            for index, tensor in enumerate(OPS[node.op_type].inputs):
                if tensor.name in names.WEIGHT_ROLES and node.op_type.endswith(("Linear", "Residual")):
                    own = held[node.input[index]]
                    form = (tensor.name, own.data_type, *own.dims)
                    node.input[index] = shared.setdefault(form, own.name)
                    if tensor.name == "codes" and node.input[index] != own.name:
                        weights += math.prod(self.traced.expression(own.name).shape)
        read = {name for node in model.graph.node for name in node.input}
        kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        return model, weights


@pytest.fixture(scope="module", params=[4, 3])
def demo(request, tmp_path_factory):
    return request.param, Demo(request.param, tmp_path_factory.mktemp("demo"))


def test_the_demo_builds_with_every_node_a_plugin_and_its_weights_packed(demo):
    bits, demo = demo
    parsed, engine = demo.engine(demo.model)
    assert parsed.plugins() == [node.name for node in lrq_nodes(demo.model.graph.node)]
    assert len(parsed.plugins()) > 50
    codes = [tensor.raw_data for tensor in demo.model.graph.initializer if tensor.name in demo.traced.codes_inputs()]
    assert len(codes) > 20
    assert all(raw in engine for raw in codes)
    shared, weights = demo.sharing_weights()
    _, smaller = demo.engine(shared)
    assert weights > 5_000_000
    assert bits < 8 * (len(engine) - len(smaller)) / weights <= MOST_BITS[bits]


def test_an_int8_tensor_may_pass_from_one_plugin_to_others(tmp_path):
    """An experiment, for a lowering to come: one rotation that quantizes, and several products that read its codes."""
    trt_build.skip_if_missing()
    probe = tmp_path / "libprobe.so"
    trt_build.compile_together([trt_build.HOST / "int8_probe.cpp"], trt_build.all_headers()[0], "-shared", "-fPIC",
                               "-fvisibility=hidden", "-o", str(probe))  # fmt: skip
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21, "probe": 1]>
        g (float[B, T, 64] x) => (float[B, T, 64] k, float[B, T, 32] v) {
            q, scale = probe.ProbeQuantize(x)
            k = probe.ProbeProduct(q, scale)
            low, high = Split<axis = 2, num_outputs = 2>(q)
            low_scale, high_scale = Split<axis = 2, num_outputs = 2>(scale)
            v = probe.ProbeProduct(high, high_scale)
        }""")
    with rtx.loaded(probe):
        parsed = rtx.Parsed(model)
        assert parsed.taken, parsed.errors
        assert len(parsed.plugins()) == 3
        quantize = parsed.layers(trt.LayerType.PLUGIN_V3)[0]
        assert [quantize.get_output(index).dtype for index in range(2)] == [trt.DataType.INT8, trt.DataType.FLOAT]
        parsed.engine({"x": ((1, 1, 64), (2, 16, 64), (4, 64, 64))})
        del quantize, parsed
