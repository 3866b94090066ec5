import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graph_texts import ATTENTION

from graphs.checks import check
from graphs.equalizer import encode
from graphs.expressions import RotateOutput
from graphs.passes import make_linear, merge_projections
from graphs.traced import METADATA_KEY, Signs, TracedGraph, sort_nodes

TEXT = """
mlp (float[batch, tokens, 24] x, float[batch] unread) => (float[batch, tokens, 24] y)
<float[24] gain = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24}>
{
    r = Rotate<block = 24, seed = 3>(x)
    u = Linear<rows = 48, cols = 24>(r)
    v = Linear<rows = 24, cols = 48, bits = 8, bias = 0>(u)
    y = Mul(v, gain)
}
"""


@pytest.fixture
def traced(parse):
    return parse(TEXT)


def test_placeholders_are_the_weights_and_the_rest_are_model_inputs(traced):
    assert [tensor.name for tensor in traced.model_inputs()] == ["x", "unread"]
    inputs = {tensor.name for tensor in traced.graph.inputs}
    assert inputs - {"x", "unread"} == {
        "u.codes", "u.exponents", "u.scale", "u_bias", "v.codes", "v.scale",
    }  # fmt: skip
    assert inputs & traced.placeholders() == inputs - {"x", "unread"}
    assert set(traced.signs) == {"signs24_3"}


def test_the_table_of_a_codebook_is_a_placeholder(parse):
    text = TEXT.replace("rows = 48,", "rows = 48, codebook = 1,")
    traced = parse(text)
    assert [tensor.name for tensor in traced.model_inputs()] == ["x", "unread"]
    assert {"u.codes", "u.table", "u.scale"} <= {tensor.name for tensor in traced.graph.inputs}


def test_onnx_round_trip_keeps_everything(traced, difference):
    model = traced.to_onnx()
    again = TracedGraph.from_onnx(onnx.load_from_string(model.SerializeToString()))
    assert vars(again) | {"graph": None} == vars(traced) | {"graph": None}
    assert again.to_onnx() == model
    assert difference(traced, again) == 0


def test_equal_tables_make_equal_files_in_whatever_order_they_were_filled(traced):
    model = traced.to_onnx()
    traced.linears, traced.tensors = (dict(reversed(each.items())) for each in (traced.linears, traced.tensors))
    assert list(traced.linears) == ["v.codes", "u.codes"]
    assert traced.to_onnx() == model


def test_reading_a_graph_back_does_not_change_the_model(traced):
    model = traced.to_onnx()
    before = model.SerializeToString(deterministic=True)
    TracedGraph.from_onnx(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_model_without_tables_is_refused(traced):
    model = traced.to_onnx()
    del model.metadata_props[:]
    with pytest.raises(ValueError, match=f"no '{METADATA_KEY}' metadata, so it is not a traced graph"):
        TracedGraph.from_onnx(model)


def test_a_copy_is_independent(traced):
    before = traced.to_onnx()
    copy = traced.copy()
    copy.rotate_outputs({"u.codes": RotateOutput(48)})
    copy.graph.nodes[0].attrs["block"] = 12
    copy.graph.outputs.clear()
    copy.forget_unused()
    assert traced.to_onnx() == before


def test_rotating_an_output_appends_to_weight_and_bias(traced):
    step = RotateOutput(12, 7)
    traced.rotate_outputs(dict.fromkeys(["u.codes", "u_bias", "v.codes"], step))
    assert traced.linears["u.codes"].weight.maps[-1] == step
    assert traced.tensors["u_bias"].maps == (step,)
    assert traced.linears["v.codes"].weight.maps == (step,)
    check(traced)


def test_a_rotation_that_does_not_fit_the_bias_changes_nothing(traced):
    before = traced.to_onnx()
    with pytest.raises(ValueError, match="does not divide"):
        traced.rotate_outputs({"v.codes": RotateOutput(24), "u_bias": RotateOutput(36)})
    assert traced.to_onnx() == before


def test_forgetting_drops_dead_nodes_weights_and_signs_but_no_model_input(traced):
    multiply = traced.graph.nodes[-1]
    multiply.inputs = [traced.graph.inputs[0], multiply.inputs[1]]
    traced.forget_unused()
    assert [node.op for node in traced.graph.nodes] == ["Mul"]
    assert (traced.linears, traced.tensors, traced.signs) == ({}, {}, {})
    assert [tensor.name for tensor in traced.graph.inputs] == ["x", "unread"]
    check(traced)


def test_forgetting_keeps_a_stack_and_its_parts_as_long_as_it_is_read(parse):
    traced = parse(ATTENTION)
    make_linear(traced)
    merge_projections(traced)
    assert set(traced.stacks) == {f"q+k+v.{role}" for role in ("codes", "exponents", "scale", "bias")}
    assert set(traced.linears) == {f"{layer}.codes" for layer in "qkvy"}
    assert traced.expression("q+k+v.codes").shape == (72, 24)
    assert traced.expression("y.codes") == traced.linears["y.codes"].weight
    last = traced.graph.nodes[-1]
    last.inputs[0] = traced.graph.inputs[0]
    traced.forget_unused()
    assert (set(traced.stacks), set(traced.linears), set(traced.tensors)) == (set(), {"y.codes"}, {"y_bias"})
    check(traced)


def test_forgetting_restores_the_order_of_nodes(traced):
    traced.graph.nodes.reverse()
    traced.forget_unused()
    check(traced)


def test_signs_are_over_the_divisors_that_equalize():
    assert Signs(3).magnitudes(3).tolist() == [1, 1, 1]
    assert Signs(3, encode(np.array([0.5, 1, 4]))).magnitudes(3).tolist() == [2, 1, 0.25]
    assert Signs(3, encode(np.array([0.5, 1, 4]))).magnitudes(3).dtype == Signs().magnitudes(3).dtype == np.float32


def test_forgetting_nothing_changes_nothing(traced):
    before = traced.to_onnx()
    traced.forget_unused()
    assert traced.to_onnx() == before


def test_sorting_is_stable_and_repairs_any_order(traced):
    names = [node.name for node in traced.graph.nodes]
    sort_nodes(traced.graph)
    assert [node.name for node in traced.graph.nodes] == names
    traced.graph.nodes.reverse()
    sort_nodes(traced.graph)
    check(traced)


@pytest.mark.parametrize("inner", [
    "c = Abs(a)",
    "c = If (flag) <then_branch = t () => (float[4] e) { e = Abs(a) }, "
    "else_branch = f () => (float[4] g) { g = Neg(x) }>",
], ids=["in a branch", "in a branch of a branch"])  # fmt: skip
def test_sorting_reads_through_subgraphs(inner):
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]>
        branch (float[4] x, bool flag) => (float[4] y)
        {{
            a = Relu(x)
            b = Neg(x)
            y = If (flag) <then_branch = yes () => (float[4] c) {{ {inner} }},
                           else_branch = no () => (float[4] d) {{ d = Add(b, x) }}>
        }}
    """)
    graph = gs.import_onnx(model)
    graph.nodes.reverse()
    sort_nodes(graph)
    assert [node.op for node in graph.nodes] in (["Relu", "Neg", "If"], ["Neg", "Relu", "If"])


def test_sorting_takes_outputs_and_inputs_that_are_left_out_for_no_edge(parse):
    """Clip's lower bound and the norm's mean are both left out, so both are named ''."""
    graph = parse("""
        g (float[2, 4] x, float[4] scale, float high) => (float[2, 4] y, float[2, 1] deviation)
        {
            a = Clip(x, "", high)
            y, "", deviation = LayerNormalization(a, scale)
        }
    """).graph
    graph.nodes.reverse()
    sort_nodes(graph)
    assert [node.op for node in graph.nodes] == ["Clip", "LayerNormalization"]


def test_a_tensor_that_all_later_nodes_read_is_no_cycle(parse):
    graph = parse("""
        dense (float[4] x) => (float[4] y)
        { a = Relu(x) b = Neg(a) c = Add(a, b) d = Add(a, c) y = Add(a, d) }
    """).graph
    in_order = list(graph.nodes)
    graph.nodes.reverse()
    sort_nodes(graph)
    assert [node.name for node in graph.nodes] == [node.name for node in in_order]


def test_a_cycle_is_refused():
    one, other = gs.Variable("one"), gs.Variable("other")
    nodes = [gs.Node("Relu", "first", inputs=[one], outputs=[other]), gs.Node("Relu", inputs=[other], outputs=[one])]
    with pytest.raises(ValueError, match="the graph has a cycle through Relu 'first'"):
        sort_nodes(gs.Graph(nodes, outputs=[one]))
