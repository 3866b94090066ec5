import onnx
import onnx_graphsurgeon as gs
import pytest

from graphs.checks import check, check_preserved
from graphs.passes import constant_fold, dead_code

NEUTRAL = """
neutral (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
<float one = {{1}}, float nought = {{0}}, float two = {{2}}, float[1, 1, 1, 1] more_axes = {{1}}>
{{
    a = Relu(x)
    b = {step}
    y = Linear<rows = 24, cols = 24>(b)
}}
"""
STEPS = {
    "Identity": "Identity(a)", "Cast to its own type": "Cast<to = 1>(a)", "Transpose": "Transpose<perm = [0, 1, 2]>(a)",
    "times 1": "Mul(a, one)", "over 1": "Div(a, one)", "plus 0": "Add(a, nought)", "minus 0": "Sub(a, nought)",
}  # fmt: skip
KEPT = {
    "times 2": "Mul(a, two)",
    "plus 1": "Add(a, one)",
    "1 minus": "Sub(one, a)",
    "turned": "Transpose<perm = [0, 2, 1]>(a)",
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_what_does_nothing_goes(parse, difference, step):
    traced = parse(NEUTRAL.format(step=step))
    before = traced.copy()
    assert dead_code(traced).fired == 1
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11
    assert dead_code(traced).fired == 0


@pytest.mark.parametrize("step", KEPT.values(), ids=KEPT.keys())
def test_what_does_something_stays(parse, step):
    traced = parse(NEUTRAL.format(step=step))
    before = [node.op for node in traced.graph.nodes]
    assert dead_code(traced).fired == 0
    assert [node.op for node in traced.graph.nodes] == before


def test_what_changes_the_number_of_axes_stays(parse):
    text = NEUTRAL.format(step="Mul(a, more_axes)").replace("24] y)", "24] y, float[q, batch, tokens, 24] b)")
    traced = parse(text.replace("y = Linear<rows = 24, cols = 24>(b)", "y = Linear<rows = 24, cols = 24>(a)"))
    assert dead_code(traced).fired == 0


def test_an_output_keeps_what_computes_it(parse):
    traced = parse("g (float[batch, 24] x) => (float[batch, 24] y) { a = Relu(x) y = Identity(a) }")
    assert dead_code(traced).fired == 0


def test_nodes_that_no_output_needs_go_with_their_weights(parse):
    traced = parse(NEUTRAL.format(step="Relu(a)"))
    linear = {"y.codes", "y_bias"}
    assert linear <= traced.placeholders()
    traced.graph.outputs = [gs.Variable("y", "float32", ["batch", "tokens", 24])]
    traced.graph.nodes.append(gs.Node("Neg", "neg", {}, [traced.graph.inputs[0]], traced.graph.outputs))
    traced.graph.nodes[-2].outputs[0].name = "unread"
    assert dead_code(traced).fired > 3
    assert [node.op for node in traced.graph.nodes] == ["Neg"]
    assert not traced.placeholders()


CONSTANTS = f"""
constants (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
<float[24] a = {{{", ".join(map(str, range(24)))}}}, float two = {{2}}>
{{
    half = Reciprocal(two)
    factors = Mul(a, half)
    scaled = Mul(x, factors)
    y = Linear<rows = 24, cols = 24>(scaled)
}}
"""


def test_constants_are_computed_ahead(parse, difference):
    traced = parse(CONSTANTS)
    before = traced.copy()
    assert constant_fold(traced).fired == 2
    assert traced.graph.nodes[0].inputs[1].values.tolist() == [i / 2 for i in range(24)]
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11
    assert constant_fold(traced).fired == 0


def test_what_depends_on_an_input_or_a_weight_is_not_computed_ahead(parse):
    traced = parse(CONSTANTS.replace("24] x)", "24] x, float two)").replace(", float two = {2}", ""))
    before = traced.to_onnx()
    assert constant_fold(traced).fired == 0
    assert traced.to_onnx() == before


def test_an_lrq_node_stays_even_if_its_input_is_constant(parse):
    text = (
        "g (float[batch, 24] x) => (float[batch, 24] y) <float[24] a = {%s}> { r = Rotate<block = 8>(a) y = Add(x, r) }"
    )
    traced = parse(text % ", ".join(["1"] * 24))
    assert constant_fold(traced).fired == 0
    assert onnx.checker.check_model(traced.to_onnx()) is None
