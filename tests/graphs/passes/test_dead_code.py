import onnx_graphsurgeon as gs
import pytest

from graphs.checks import check, check_preserved
from graphs.passes import dead_code

NEUTRAL = """
neutral (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
<float one = {{1}}, float nought = {{0}}, float two = {{2}}>
{{
    a = Relu(x)
    b = {step}
    y = Linear<rows = 24, cols = 24>(b)
}}
"""
STEPS = {
    "Identity": "Identity(a)", "Cast to its own type": "Cast<to = 1>(a)", "Transpose": "Transpose<perm = [0, 1, 2]>(a)",
    "times 1": "Mul(a, one)", "over 1": "Div(a, one)", "plus 0": "Add(a, nought)", "minus 0": "Sub(a, nought)",
    "1 times": "Mul(one, a)", "0 plus": "Add(nought, a)",
}  # fmt: skip
KEPT = {
    "times 2": "Mul(a, two)",
    "plus 1": "Add(a, one)",
    "1 minus": "Sub(one, a)",
    "0 minus": "Sub(nought, a)",
    "1 over": "Div(one, a)",
    "turned": "Transpose<perm = [0, 2, 1]>(a)",
    "turned by default": "Transpose(a)",
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


def test_a_node_of_another_domain_stays(parse):
    traced = parse(NEUTRAL.format(step="Identity(a)"))
    traced.graph.nodes[1].domain = "other"
    assert dead_code(traced).fired == 0


GROWING = {
    "more axes": "z (float[batch, 24] x) => (float[1, batch, 24] y) <float[1, 1, 1] c = {1}>",
    "a longer axis": "z (float[batch, 1, 2] x) => (float[batch, 3, 2] y) <float[1, 3, 2] c = {1, 1, 1, 1, 1, 1}>",
    "no known shape": "z (float[batch, 24] x, int64[n] s) => (float[a, b, c] y) <float[1, 1, 1] c = {1}>",
}


@pytest.mark.parametrize("head", GROWING.values(), ids=GROWING.keys())
def test_what_changes_the_shape_stays(parse, head):
    a = "Reshape(x, s)" if "s)" in head else "Abs(x)"
    traced = parse(f"{head} {{ a = {a} b = Mul(a, c) y = Relu(b) }}")
    assert dead_code(traced).fired == 0
    assert [node.op for node in traced.graph.nodes][1:] == ["Mul", "Relu"]


def test_a_transpose_in_place_goes_even_if_no_shape_is_known(parse):
    traced = parse("""
        g (float[batch, 24] x, int64[n] s) => (float[a, b, c] y)
        { any = Reshape(x, s) same = Transpose<perm = [0, 1, 2]>(any) y = Relu(same) }
    """)
    assert dead_code(traced).fired == 1
    assert [node.op for node in traced.graph.nodes] == ["Reshape", "Relu"]


def test_an_output_keeps_what_computes_it(parse):
    traced = parse("g (float[batch, 24] x) => (float[batch, 24] y) { a = Relu(x) y = Identity(a) }")
    result = dead_code(traced)
    assert result.fired == 0
    assert list(result.reasons()) == ["Identity hands on its input as an output of the graph, which keeps its name"]


@pytest.mark.parametrize(("to", "fired"), [(16, 1), (1, 0)], ids=["its own", "another"])
def test_a_type_that_numpy_lacks_is_known(parse, to, fired):
    """graphsurgeon holds bfloat16 as ONNX's number of it, and a Cast to float is a conversion."""
    name = {16: "bfloat16", 1: "float"}[to]
    text = f"g (bfloat16[batch, 24] x) => ({name}[batch, 24] y) {{ a = Neg(x) b = Cast<to = {to}>(a) y = Abs(b) }}"
    assert dead_code(parse(text)).fired == fired


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


def test_a_cast_of_an_unknown_type_stays(parse):
    """numpy takes no type for float64."""
    text = "g (float[batch, 24] x) => (double[batch, 24] y) { a = Neg(x) b = Cast<to = 11>(a) y = Abs(b) }"
    traced = parse(text)
    traced.graph.nodes[0].outputs[0].dtype = None
    assert dead_code(traced).fired == 0
    assert [node.op for node in traced.graph.nodes] == ["Neg", "Cast", "Abs"]
