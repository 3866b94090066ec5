"""The traced and the portable graph: names, dynamic dimensions, dialect nodes with plugin attributes and bodies."""

import onnx
import pytest
from onnx import TensorProto, helper
from torch import nn

from graphs import names
from graphs.passes import PIPELINE
from graphs.passes.patterns import LINEAR_OPS, ROTATE_OPS
from graphs.traced import TracedGraph
from lrq_export.models.base import SAMPLES, InputSpec
from lrq_export.plan import LayerPlan, plan_layers
from lrq_export.source import open_source
from lrq_export.trace import trace

INPUTS = ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"]


@pytest.fixture(scope="module")
def portable(package):
    return onnx.load(package / "model.onnx")


@pytest.fixture(scope="module")
def traced(package):
    return TracedGraph.from_onnx(onnx.load(package / "graphs" / "0-trace.onnx"))


def test_the_same_model_and_plans_give_the_same_graph(package, tiny, export_afresh, monkeypatch):
    monkeypatch.setattr("lrq_export.trace.export_model", export_afresh)
    model = open_source(tiny.source)
    plans = plan_layers(model.model(), model.family, tiny.recipe().for_family(model.family))
    again, saved = trace(model.family, model.config, plans), onnx.load(package / "graphs" / "0-trace.onnx")
    assert again.to_onnx().SerializeToString(deterministic=True) == saved.SerializeToString(deterministic=True)


def shape(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def attributes(node):
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def ops(graph, *op_types):
    return [node for node in graph.node if node.op_type in op_types]


def test_inputs_keep_the_names_of_the_forward_arguments_and_the_output_is_sample(portable):
    assert [value.name for value in portable.graph.input] == INPUTS
    assert [value.name for value in portable.graph.output] == ["sample"]


def test_batch_height_width_and_text_are_dynamic(portable):
    shapes = {value.name: shape(value) for value in portable.graph.input}
    samples, channels, height, width = shapes["hidden_states"]
    assert channels == 1
    assert all(isinstance(extent, str) for extent in (samples, height, width))
    assert len({samples, height, width}) == 3
    text = shapes["encoder_hidden_states"][1]
    assert isinstance(text, str)
    assert shapes["encoder_hidden_states"] == [samples, text, 16]
    assert shapes["encoder_attention_mask"] == [samples, text]
    assert shapes["timestep"] == [samples]


def test_every_quantized_layer_is_in_one_node_with_its_plugin_attributes(portable):
    nodes = ops(portable.graph, *LINEAR_OPS)
    # Per block: q, k, v of the first attention are one; q, and k with v, of the second; two outputs; two of the MLP.
    assert len(nodes) == 2 * (1 + 2 + 2 + 2)
    for node in nodes:
        values = attributes(node)
        assert node.domain == names.DOMAIN
        assert (values["plugin_version"], values["plugin_namespace"]) == (b"1", b"")
        assert (values["bits"], values["act_bits"], values["fraction_bits"], values["integer_bits"]) == (4, 8, 4, 6)


def test_rotations_are_shared_by_siblings_and_folded_before_attention_outputs(portable):
    rotations = ops(portable.graph, *ROTATE_OPS)
    # Per block: q, k, v of the first attention share one; q of the second; feed-forward in; feed-forward out.
    # All k and v of second attentions read the same text, which the caption projection rotates.
    assert len(rotations) == 2 * 4
    for node in rotations:
        values = attributes(node)
        assert (values["plugin_version"], values["plugin_namespace"]) == (b"1", b"")
        assert values["block"] in (24, 96)
    rotated = {node.output[0] for node in rotations}
    for node in ops(portable.graph, *LINEAR_OPS):
        folded = ".to_out." in node.input[1] or "attn2.to_k" in node.input[1]
        assert (node.input[0] in rotated) != folded, node.input[1]


def test_every_dialect_op_has_a_body_of_standard_ops(portable):
    bodies = {function.name: function for function in portable.functions}
    assert {node.op_type for node in portable.graph.node if node.domain == names.DOMAIN} <= bodies.keys()
    for function in bodies.values():
        assert function.domain == names.DOMAIN
        for node in function.node:
            assert node.domain in ("", "ai.onnx") or node.op_type in bodies
    assert {entry.domain for entry in portable.opset_import} == {"", names.DOMAIN}
    onnx.checker.check_model(portable)


def test_weights_are_packed_four_bit_integers(portable):
    tensors = {tensor.name: tensor for tensor in portable.graph.initializer}
    for node in ops(portable.graph, *LINEAR_OPS):
        codes, exponents, scale, bias = (tensors[name] for name in node.input[1:5])
        values = attributes(node)
        assert codes.data_type == TensorProto.INT4
        assert len(codes.raw_data) == values["rows"] * values["cols"] // 2
        assert exponents.data_type == TensorProto.INT8
        assert list(exponents.dims) == [values["rows"], 1, 2, 3]
        assert scale.data_type == bias.data_type == TensorProto.FLOAT


def test_the_trace_holds_expressions_and_no_weights(traced, package):
    assert (package / "graphs" / "0-trace.onnx").stat().st_size < 100_000
    assert {weight.weight.source for weight in traced.linears.values()} == {
        name.removesuffix(".codes") + ".weight" for name in traced.linears
    }
    kept = {expression.source for expression in traced.tensors.values()}
    assert "transformer_blocks.1.attn2.to_q.bias" in kept
    assert "proj_out.weight" in kept
    assert "transformer_blocks.1.attn2.to_q.weight" not in kept


def test_a_pass_that_did_nothing_would_be_seen(package):
    fired = {}
    for index, step in enumerate(PIPELINE):
        model = onnx.load(package / "graphs" / f"{index + 1}-{step.__name__}.onnx")
        (record,) = (entry.value for entry in model.metadata_props if entry.key == "lrq.pass")
        fired |= {step.__name__: record}
    idle = {name for name, record in fired.items() if '"fired": 0' in record}
    assert idle == {"dead_code", "cancel_rotations", "fold_smoothing"}  # the tiny graph has nothing for these


class Toy:
    """A family of one model: two layers, the first called twice, and a slice and a product that do nothing."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.once = nn.Linear(4, 4), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.once(self.twice(self.twice(x)[:, 0:] * 1))

    def construct(self, config):
        return self.Model()

    def inputs(self, config):
        return {"x": InputSpec((SAMPLES, "tokens", 4))}

    def call(self, model, inputs):
        return model(inputs["x"])

    def make_traceable(self, model):
        return model


def plan(name, rows, block):
    return LayerPlan(name, rows, 4, 4, 4, 8, block, None, "")


def test_a_planned_layer_is_written_out_and_one_called_twice_has_one_weight():
    traced = trace(Toy(), {}, [plan("twice", rows=4, block=4), plan("once", rows=2, block=0)])
    nodes = [(node.op, [tensor.name for tensor in node.inputs]) for node in traced.graph.nodes]
    assert [op for op, _ in nodes if op != "TwinLogDequant" and op != "Transpose"] == [
        "HadamardRotate", "MatMul", "Add", "HadamardRotate", "MatMul", "Add", "MatMul",
    ]  # fmt: skip
    assert [read for op, read in nodes if op == "TwinLogDequant"] == [
        [f"{layer}.{role}" for role in ("codes", "exponents", "scale")] for layer in ("twice", "once")
    ]
    assert [read[1] for op, read in nodes if op == "HadamardRotate"] == ["signs.4", "signs.4"]
    assert [read[1] for op, read in nodes if op == "Add"] == ["twice.bias", "twice.bias"]
    assert [list(tensor.shape) for tensor in traced.graph.inputs if tensor.name == "once.codes"] == [[2, 1, 4]]


def test_free_dimensions_of_layers_keep_their_names():
    traced = trace(Toy(), {}, [plan("twice", rows=4, block=4), plan("once", rows=2, block=0)])
    assert {tuple(node.outputs[0].shape) for node in traced.graph.nodes if node.op == "MatMul"} == {
        (SAMPLES, "tokens", 4), (SAMPLES, "tokens", 2),
    }  # fmt: skip
