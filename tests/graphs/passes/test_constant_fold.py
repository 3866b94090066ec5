import graph_texts

from graphs.checks import check, check_preserved
from graphs.passes import constant_fold

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
    assert [node.op for node in traced.graph.nodes] == ["HadamardRotate", "Add"]


def test_what_would_be_large_is_left_and_said(parse):
    """A constant of more than a megabyte from a few bytes: the file would hold it."""
    text = graph_texts.edited(
        CONSTANTS,
        ("two = {2}", "two = {2}, int64[2] wide = {20000, 24}"),
        ("tokens, 24] y)", "tokens, 24] y, float[20000, 24] many)"),
        ("factors =", "many = Expand(a, wide) factors ="),
    )
    traced = parse(text)
    result = constant_fold(traced)
    assert any(reason.startswith("Expand of constants is larger than 1048576 bytes") for reason in result.reasons())
    assert "Expand" in [node.op for node in traced.graph.nodes]
