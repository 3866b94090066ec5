from functools import partial

import graph_texts
import pytest
from onnx.printer import to_text

from graphs.checks import check, check_preserved
from graphs.passes import PIPELINE, fuse_activation

BENT = """
feed_forward (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    a = Relu(x)
    g = Gelu(a)
    r = Rotate<block = 12, seed = 7>(g)
    y = Linear<rows = 24, cols = 24>(r)
}
"""
GELU, SILU = "g = Gelu(a)", "s = Sigmoid(a) g = Mul(a, s)"
# GEGLU: one projection makes the hidden channels and those that gate them.
GATED = """
geglu (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
<int64[2] halves = {36, 36}>
{
    both = Linear<rows = 72, cols = 24>(x)
    hidden, gate = Split<axis = -1>(both, halves)
    active = Gelu(gate)
    g = Mul(hidden, active)
    r = Rotate<block = 12, width = 36, seed = 7>(g)
    y = Linear<rows = 24, cols = 36>(r)
}
"""
SPLIT, ACTIVE, PRODUCT = (
    "hidden, gate = Split<axis = -1>(both, halves)", "active = Gelu(gate)", "g = Mul(hidden, active)",
)  # fmt: skip
TANH = '<approximate = "tanh">'


bent, gated = (partial(graph_texts.edited, text) for text in (BENT, GATED))
# The exact GELU in single steps, and what else may be written in its place.
ERF = "d = Div(a, root) e = Erf(d) f = Add(e, one) h = Mul(a, f) g = Mul(h, half)"
NUMBERS = (
    "24] y)\n{",
    "24] y)\n<float one = {1}, float half = {0.5}, float root = {1.4142135}, float inverse = {0.70710678}, "
    "float two = {2}, float[1, 1, 1, 1] half4 = {0.5}>\n{",
)


def written_out(*edits) -> str:
    return bent((GELU, graph_texts.edited(ERF, *edits)), NUMBERS)


def gate_written_out(*edits) -> str:
    erf = graph_texts.edited(ERF, *edits).replace("(a, ", "(gate, ").replace("g =", "active =")
    return gated(
        (ACTIVE, erf), ("{36, 36}>", "{36, 36}, float one = {1}, float half = {0.5}, float root = {1.4142135}>")
    )


FIRES = {
    "Gelu": (bent(), "GeluRotate"),
    "Gelu that says it is exact": (bent((GELU, 'g = Gelu<approximate = "none">(a)')), "GeluRotate"),
    "Gelu with a tanh": (bent((GELU, f"g = Gelu{TANH}(a)")), "GeluTanhRotate"),
    "Silu": (bent((GELU, SILU)), "SiluRotate"),
    "Silu, the sigmoid on the left": (bent((GELU, SILU.replace("a, s", "s, a"))), "SiluRotate"),
    "of an input of the graph": (bent((GELU, "g = Gelu(x)"), ("a = Relu(x)", "")), "GeluRotate"),
    "what is activated is read elsewhere": (
        bent((GELU, "g = Gelu(a) z = Neg(a)"), ("24] y)", "24] y, float[batch, tokens, 24] z)")), "GeluRotate"),
    "equalizing alone": (bent(("block = 12, seed = 7", "block = 1, equalized = 3")), "GeluRotate"),
    "Geglu": (gated(), "GegluRotate"),
    "Geglu, the gate on the left": (gated((PRODUCT, "g = Mul(active, hidden)")), "GegluRotate"),
    "Geglu that says it is exact": (gated((ACTIVE, 'active = Gelu<approximate = "none">(gate)')), "GegluRotate"),
    "Geglu, the axis counted from the first": (gated((SPLIT, SPLIT.replace("-1", "2"))), "GegluRotate"),
    "Geglu of two parts of unnamed size": (
        gated((SPLIT, "hidden, gate = Split<axis = -1, num_outputs = 2>(both)")), "GegluRotate"),
    "Gelu written with Erf": (written_out(), "GeluRotate"),
    "Gelu written with Erf, half of x first": (
        written_out(("h = Mul(a, f) g = Mul(h, half)", "h = Mul(half, a) g = Mul(f, h)")), "GeluRotate"),
    "Gelu written with Erf, half of the sum first": (
        written_out(("e, one", "one, e"), ("h = Mul(a, f) g = Mul(h, half)", "h = Mul(f, half) g = Mul(h, a)")),
        "GeluRotate"),
    "Gelu written with Erf of a product": (written_out(("Div(a, root)", "Mul(inverse, a)")), "GeluRotate"),
    "Gelu written with Erf, of a product": (
        bent(("a = Relu(x)", "a = Mul(x, x)"), (GELU, ERF), NUMBERS), "GeluRotate"),
    "Geglu, its Gelu written with Erf": (gate_written_out(), "GegluRotate"),
}  # fmt: skip


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def case(request, parse):
    text, op = request.param
    return parse(text), op


def rotations(traced):
    return [node for node in traced.graph.nodes if node.op.endswith("Rotate")]


def test_fuses_and_keeps_the_function(case, difference):
    traced, op = case
    before = traced.copy()
    assert fuse_activation(traced).fired == 1
    assert [node.op for node in rotations(traced)] == [op]
    (a,) = {node.op for node in before.graph.nodes if node.outputs[0].name == "a"} or {None}
    assert not {"Gelu", "Sigmoid", "Erf", "Mul", "Split"} & {node.op for node in traced.graph.nodes} - {a}
    assert traced.signs == before.signs
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


def test_the_passes_before_it_leave_an_activation_whole(case):
    traced, op = case
    for step in PIPELINE:
        step(traced)
    assert [node.op for node in rotations(traced)] == [op]


@pytest.mark.parametrize("text", [BENT, GATED], ids=["Gelu", "Geglu"])
def test_an_activation_whose_shape_is_read_is_not_computed_twice(parse, difference, text):
    traced = parse(
        graph_texts.edited(text, ("24] y)", "24] y, int64[3] size)"), ("r = Rotate", "size = Shape(g) r = Rotate"))
    )
    before = traced.copy()
    assert fuse_activation(traced).fired == 1
    assert not {"Gelu", "Mul", "Split"} & {node.op for node in traced.graph.nodes}
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


def test_fusing_again_does_nothing(case):
    traced, _ = case
    fuse_activation(traced)
    before = traced.to_onnx()
    assert fuse_activation(traced).fired == 0
    assert traced.to_onnx() == before


OTHER_DOMAIN = [
    (BENT, "g"), (GATED, "hidden"), (GATED, "active"), (GATED, "g"), *((written_out(), name) for name in "defhg"),
    (bent((GELU, SILU)), "s"), (bent((GELU, SILU)), "g"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name"), OTHER_DOMAIN)
def test_a_node_of_another_domain_is_no_part_of_an_activation(parse, text, name):
    traced = parse(text)
    (node,) = traced.graph.tensors()[name].inputs
    node.domain = "other"
    assert fuse_activation(traced).fired == 0


NO_SILU = "a Sigmoid multiplies it, but of another tensor: no SiLU"
NO_HALVES = "a Gelu multiplies it, but the two are not the halves of one tensor's channels"
ELSEWHERE = "the activated tokens are also read elsewhere, or rotated in another way"
NO_ERF = "a sum with Erf multiplies it: no Gelu, or one that is written out in an unknown way"
NO_TANH = NO_ERF.replace("Erf", "Tanh")
NOT = {
    "the whole of the sum with Erf": (written_out(("g = Mul(h, half)", "g = Identity(h)")), None),
    "the whole of x by the sum with Erf": (written_out(("h, half", "h, one")), NO_ERF),
    "half of another tensor": (written_out(("Mul(a, f)", "Mul(x, f)")), NO_ERF),
    "half of x twice": (written_out(("h = Mul(a, f)", "aa = Mul(a, a) h = Mul(aa, f)")), NO_ERF),
    "the sum with Erf twice": (written_out(("h = Mul(a, f)", "ff = Mul(f, f) h = Mul(a, ff)")), NO_ERF),
    "2 + Erf": (written_out(("e, one", "e, two")), NO_ERF),
    "x + Erf": (written_out(("e, one", "e, a")), NO_ERF),
    "Erf of x": (written_out(("Div(a, root)", "Div(a, one)")), NO_ERF),
    "Erf of x √2": (written_out(("Div(a, root)", "Mul(a, root)")), NO_ERF),
    "Erf of √2 / x": (written_out(("Div(a, root)", "Div(root, a)")), NO_ERF),
    "Erf of x by another tensor": (written_out(("Div(a, root)", "Div(a, x)")), NO_ERF),
    "Gelu written with Erf that has more axes": (
        bent((GELU, ERF.replace("h, half", "h, half4")), NUMBERS,
             ("(float[batch, tokens, 24] y)", "(float[q, batch, tokens, 24] y)")),
        NO_ERF),
    "Gelu written with Erf, of what has no known shape": (
        bent((GELU, ERF.replace("h, half", "h, half4")), NUMBERS, ("a = Relu(x)", "a = Reshape(x, s)"),
             ("24] x)", "24] x, int64[n] s)"), ("(float[batch, tokens, 24] y)", "(float[q, batch, tokens, 24] y)")),
        NO_ERF),
    "Gelu written with Erf, by what has no known shape": (
        graph_texts.edited(
            written_out(("g = Mul(h, half)", "hh = Mul(h, half) any = Reshape(x, s) g = Mul(hh, any)")),
            ("24] x)", "24] x, int64[n] s)")), NO_HALVES),
    "Gelu written with Tanh": (
        bent((GELU, "t = Tanh(a) f = Add(t, one) h = Mul(a, f) g = Mul(h, half)"), NUMBERS), NO_TANH),
    "Geglu, another Gelu written with Erf": (gate_written_out(("h, half", "h, one")), NO_ERF),
    "read elsewhere": (
        bent(("24] y)", "24] y, float[batch, tokens, 24] z)"), ("r =", "z = Neg(g) r =")), ELSEWHERE),
    "an output of the graph": (bent(("24] y)", "24] y, float[batch, tokens, 24] g)")), ELSEWHERE),
    "rotated in two ways": (
        bent(("24] y)", "24] y, float[batch, tokens, 24] z)"),
             ("r =", "q = Rotate<block = 8>(g) z = Linear<rows = 24, cols = 24>(q) r =")), ELSEWHERE),
    "Geglu read elsewhere": (
        gated(("24] y)", "24] y, float[batch, tokens, 36] z)"), ("r =", "z = Neg(g) r =")), ELSEWHERE),
    "another activation": (bent((GELU, "g = Relu(a)")), None),
    "no activation": (bent((GELU, ""), ("(g)", "(x)")), None),
    "the sigmoid alone": (bent((GELU, "g = Sigmoid(a)")), None),
    "the sigmoid of another tensor": (bent((GELU, "s = Sigmoid(x) g = Mul(a, s)")), NO_SILU),
    "the sigmoid of a multiple": (
        bent((GELU, "m = Mul(a, a) s = Sigmoid(m) g = Mul(a, s)")), NO_SILU),
    "plus the sigmoid": (bent((GELU, SILU.replace("Mul", "Add"))), None),
    "something between": (bent(("(g)", "(t)"), ("r =", "t = Neg(g) r =")), None),
    "Geglu with a tanh": (
        gated((ACTIVE, f"active = Gelu{TANH}(gate)")),
        "its Gelu is the approximate one, GegluRotate has the exact one"),
    "halves swapped": (gated((SPLIT, SPLIT.replace("hidden, gate", "gate, hidden"))),
        "the first half of the channels is the gate, GegluRotate has it in the second"),
    "the first half twice": (gated((ACTIVE, "active = Gelu(hidden)")), NO_HALVES),
    "the second half twice": (gated((PRODUCT, "g = Mul(gate, active)")), NO_HALVES),
    "gated by another activation": (gated((ACTIVE, "active = Relu(gate)")), None),
    "gated by a SiLU": (gated((ACTIVE, "s = Sigmoid(gate) active = Mul(gate, s)")),
        "a SiLU multiplies it, and no fused op has that gate"),
    "halves of the tokens": (
        gated((SPLIT, "hidden, gate = Split<axis = 1, num_outputs = 2>(both)"), ("tokens, 24] x", "8, 24] x"),
              ("tokens, 24] y", "4, 24] y"), ("width = 36", "width = 72"), ("cols = 36", "cols = 72")), NO_HALVES),
    "two of three parts": (
        gated((SPLIT, "hidden, gate, rest = Split<axis = -1, num_outputs = 3>(both)"), ("rows = 72", "rows = 108")),
        NO_HALVES),
    "halves of the samples, by default": (
        gated((SPLIT, "hidden, gate = Split<num_outputs = 2>(both)"), ("[batch, tokens, 24] x", "[8, 24] x"),
              ("[batch, tokens, 24] y", "[4, 24] y"), ("width = 36", "width = 72"), ("cols = 36", "cols = 72")),
        NO_HALVES),
    "parts of fed sizes": (
        gated((SPLIT, SPLIT.replace("halves", "s")), ("24] x)", "24] x, int64[2] s)")), NO_HALVES),
    "parts of what has no known size": (
        gated((SPLIT, "any = Reshape(both, s) hidden, gate = Split<axis = -1, num_outputs = 2>(any)"),
              ("24] x)", "24] x, int64[3] s)")), NO_HALVES),
    "parts of what has no known shape": (
        gated((SPLIT, "any = Reshape(both, s) hidden, gate = Split<axis = -1, num_outputs = 2>(any)"),
              ("24] x)", "24] x, int64[n] s)")), NO_HALVES),
    "unequal parts": (
        gated(("{36, 36}", "{36, 1}"), ("rows = 72", "rows = 37")), NO_HALVES),
    "two tensors": (
        gated((SPLIT, "hidden = Relu(both) gate = Linear<rows = 36, cols = 24>(x)"), ("rows = 72", "rows = 36")),
        NO_HALVES),
    "channels of two Splits": (
        gated((SPLIT, f"{SPLIT} negative = Neg(both) other, last = Split<axis = -1>(negative, halves)"),
              (ACTIVE, "active = Gelu(last)")), NO_HALVES),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), NOT.values(), ids=NOT.keys())
def test_does_not_fire_and_says_why(parse, text, reason):
    traced = parse(text)
    check(traced)
    before = to_text(traced.to_onnx())
    result = fuse_activation(traced)
    assert result.fired == 0
    assert to_text(traced.to_onnx()) == before
    assert set(result.reasons()) == ({reason} if reason else set())


# What a wrong fusion would write: each shows in the function.
WRONG = {
    "GELU with a tanh for the exact one": (BENT, "GeluRotate", "GeluTanhRotate", 1e-8),
    "SiLU for GELU": (BENT, "GeluRotate", "SiluRotate", 1e-3),
    "the activation lost": (BENT, "GeluRotate", "HadamardRotate", 1e-3),
}


@pytest.mark.parametrize(("text", "right", "wrong", "least"), WRONG.values(), ids=WRONG.keys())
def test_another_activation_changes_the_function(parse, difference, text, right, wrong, least):
    before = parse(text)
    traced = before.copy()
    fuse_activation(traced)
    (node,) = rotations(traced)
    assert node.op == right
    node.op = wrong
    check(traced)
    assert difference(before, traced) > least


def test_halves_swapped_change_the_function(parse, difference):
    before = parse(gated((SPLIT, SPLIT.replace("hidden, gate", "gate, hidden"))))
    assert difference(before, parse(GATED)) > 1e-3


def test_a_long_chain_of_squares_takes_no_time(parse):
    """Taken apart to the end, forty squares are 2^40 factors."""
    squares = " ".join(f"s{n + 1} = Mul(s{n}, s{n})" for n in range(40))
    text = f"""
    squares (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
    {{
        s0 = Relu(x)
        {squares}
        r = Rotate<block = 12>(s40)
        y = Linear<rows = 24, cols = 24>(r)
    }}"""
    result = fuse_activation(parse(text))
    assert (result.fired, result.skipped) == (0, [])
