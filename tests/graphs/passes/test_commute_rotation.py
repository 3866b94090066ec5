import random
from functools import partial

import graph_texts
import numpy as np
import pytest
from graph_structure import disguise, structure
from onnx.printer import to_text

from graphs.checks import check, check_preserved
from graphs.equalizer import divisors, encode, part
from graphs.passes import commute_rotation

# What joins and divides tokens and channels, between layers whose input is rotated.
PARTS = """
parts (float[batch, 6, 24] x) => (float[batch, 2, 24] y, float[batch, 4, 24] z)
<int64[2] sizes = {2, 4}>
{
    bent = Relu(x)
    a, b = Split<axis = 1>(bent, sizes)
    ra = Rotate<block = 12>(a)
    rb = Rotate<block = 12>(b)
    y = Linear<rows = 24, cols = 24>(ra)
    z = Linear<rows = 24, cols = 24>(rb)
}
"""
SLICED = graph_texts.edited(
    PARTS,
    ("a, b = Split<axis = 1>(bent, sizes)", "a = Slice(bent, zero, two, one) b = Slice(bent, two, six, one)"),
    ("int64[2] sizes = {2, 4}", "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] six = {6}"),
)
CHANNELS = """
side_by_side (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    a = Relu(x)
    wide = Linear<rows = 48, cols = 24>(x)
    b = Gelu(wide)
    both = Concat<axis = -1>(a, b)
    rotated = Rotate<block = 12, width = 72>(both)
    y = Linear<rows = 24, cols = 72>(rotated)
}
"""
TOKENS = """
joined (float[batch, tokens, 24] x, float[batch, text, 24] c) => (float[batch, both, 24] y)
{
    a = Relu(x)
    ra = Rotate<block = 12>(a)
    rc = Rotate<block = 12>(c)
    both = Concat<axis = 1>(rc, ra)
    y = Kept<rows = 24, cols = 24>(both)
}
"""
# Some tokens of a layer meet those of another source; a rotation of all of the layer's could fold into it.
MEET = """
meet (float[batch, 6, 24] x, float[batch, text, 24] c) => (float[batch, both, 24] y, float[batch, 4, 24] z)
<int64[2] sizes = {2, 4}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] six = {6}>
{
    made = Kept<rows = 24, cols = 24>(x)
    a, b = Split<axis = 1>(made, sizes)
    ra = Rotate<block = 12>(a)
    rb = Rotate<block = 12>(b)
    rc = Rotate<block = 12>(c)
    met = Concat<axis = 1>(ra, rc)
    y = Linear<rows = 24, cols = 24>(met)
    z = Linear<rows = 24, cols = 24>(rb)
}
"""
MADE, DIVIDED = "made = Kept<rows = 24, cols = 24>(x)", "a, b = Split<axis = 1>(made, sizes)"
LAYOUT = """
layout (float[batch, tokens, 24] x) => (float[tokens, batch, 24] y)
<float half = {0.5}, int64[3] shape = {0, 0, 24}>
{
    a = Relu(x)
    scaled = Mul(half, a)
    turned = Transpose<perm = [1, 0, 2]>(scaled)
    shaped = Reshape(turned, shape)
    r = Rotate<block = 12, seed = 3>(shaped)
    y = Linear<rows = 24, cols = 24>(r)
}
"""
# The first rotation leaves signs for the first 24 channels, which nothing reads any more when the second asks for them.
GONE = """
gone (float[batch, tokens, 12] a, float[batch, tokens, 12] b, float[batch, tokens, 24] d)
    => (float[batch, tokens, 24] y, float[batch, tokens, 24] z)
<float two = {2}>
{
    inner = Concat<axis = -1>(a, b)
    outer = Concat<axis = -1>(inner, d)
    r = Rotate<block = 12, width = 48>(outer)
    y = Linear<rows = 24, cols = 48>(r)
    twice = Concat<axis = -1>(d, d)
    scaled = Mul(twice, two)
    r2 = Rotate<block = 12, width = 48>(scaled)
    z = Linear<rows = 24, cols = 48>(r2)
}
"""
BOTH = "both = Concat<axis = -1>(a, b)"
FIRES = {  # text, rotations that move, what the rotations read in the end
    "parts of a Split": (PARTS, 2, {"bent"}),
    "Slices of one tensor": (SLICED, 2, {"bent"}),
    "parts of which one is read twice": (
        graph_texts.edited(
            PARTS, ("z = Linear", "r2 = Rotate<block = 12>(b) z2 = Linear<rows = 24, cols = 24>(r2) z = Linear"),
            ("float[batch, 4, 24] z", "float[batch, 4, 24] z, float[batch, 4, 24] z2")), 3, {"bent"}),
    "parts of a Split, its axis counted from the last": (
        graph_texts.edited(PARTS, ("Split<axis = 1>", "Split<axis = -2>")), 2, {"bent"}),
    "parts of a Split, of its first axis by default": (
        graph_texts.edited(
            PARTS, ("Split<axis = 1>", "Split"), ("[batch, 6, 24] x", "[6, 24] x"), ("[batch, 2, 24] y", "[2, 24] y"),
            ("[batch, 4, 24] z", "[4, 24] z")), 2, {"bent"}),
    "Slices of one tensor, their axis counted from the last": (
        graph_texts.edited(SLICED, ("int64[1] one = {1}", "int64[1] one = {-2}")), 2, {"bent"}),
    "channels of two sources": (CHANNELS, 1, {"a", "b"}),
    "channels of two sources, their axis counted from the first": (
        graph_texts.edited(CHANNELS, ("Concat<axis = -1>", "Concat<axis = 2>")), 1, {"a", "b"}),
    "channels of two sources, twice by one rotation": (
        graph_texts.edited(
            CHANNELS, ("24] y)", "24] y, float[batch, tokens, 24] z)"),
            ("rotated =", "c = Neg(x) others = Concat<axis = -1>(c, b) "
             "turned = Rotate<block = 12, width = 72>(others) z = Linear<rows = 24, cols = 72>(turned) rotated =")),
        2, {"a", "b", "c"}),
    "channels of two sources, equalized": (
        graph_texts.edited(CHANNELS, ("width = 72", "width = 72, equalized = 4")), 1, {"a", "b"}),
    "channels that are there twice": (
        graph_texts.edited(CHANNELS, (BOTH, "both = Concat<axis = -1>(a, b, a)"), ("width = 72", "width = 96"),
                           ("y = Linear<rows = 24, cols = 72>", "y = Linear<rows = 24, cols = 96>")), 1, {"a", "b"}),
    "channels whose part of the signs was there, and has gone": (GONE, 2, {"a", "b", "d"}),
    "tokens that cannot be joined, above the Split that they come from": (
        graph_texts.edited(
            PARTS, ("y = Linear", "met = Concat<axis = 1>(ra, x) y = Kept"), ("(ra)\n", "(met)\n"),
            ("[batch, 2, 24] y", "[batch, 8, 24] y")), 2, {"bent"}),
    "a part that is an output, and scaled": (
        graph_texts.edited(
            PARTS, ("float[batch, 4, 24] z", "float[batch, 4, 24] z, float[batch, 4, 24] b"),
            ("rb = Rotate<block = 12>(b)", "s = Mul(b, half) rb = Rotate<block = 12>(s)"),
            ("int64[2] sizes = {2, 4}", "int64[2] sizes = {2, 4}, float half = {0.5}")), 1, {"a", "b"}),
    "tokens of two sources": (TOKENS, 2, {"both.joined"}),
    "tokens of two sources, some of them scaled": (
        graph_texts.edited(
            TOKENS, ("(float[batch, both, 24] y)", "(float[batch, both, 24] y)\n<float half = {0.5}>"),
            ("rc = Rotate<block = 12>(c)", "s = Mul(c, half) rc = Rotate<block = 12>(s)")), 2, {"both.joined"}),
    "tokens of two sources, their axis counted from the last": (
        graph_texts.edited(TOKENS, ("Concat<axis = 1>", "Concat<axis = -2>")), 2, {"both.joined"}),
    "tokens that meet, below a layer": (MEET, 2, {"made", "c"}),
    "tokens that meet, in Slices of a layer": (
        graph_texts.edited(
            MEET, (DIVIDED, "a = Slice(made, zero, two, one) b = Slice(made, two, six, one)")), 2, {"made", "c"}),
    "tokens that meet, scaled and moved, below a layer": (
        graph_texts.edited(
            MEET, ("ra = Rotate<block = 12>(a)", "s = Div(a, half) ra = Rotate<block = 12>(s)"),
            ("rb = Rotate<block = 12>(b)", "t = Transpose<perm = [1, 0, 2]>(b) u = Reshape(t, same) "
             "v = Transpose<perm = [1, 0, 2]>(u) rb = Rotate<block = 12>(v)"),
            ("int64[1] six = {6}", "int64[1] six = {6}, float half = {0.5}, int64[3] same = {0, 0, 24}")),
        2, {"made", "c"}),
    "tokens that meet, of a layer with a part squared": (
        graph_texts.edited(
            MEET, ("rb = Rotate<block = 12>(b)", "s = Mul(b, b) rb = Rotate<block = 12>(s)")), 2, {"met.joined", "s"}),
    "tokens that meet, of a layer with a part that is also the divisor of a number": (
        graph_texts.edited(
            MEET, ("rb = Rotate<block = 12>(b)", "s = Div(half, b) rb = Rotate<block = 12>(s)"),
            ("int64[1] six = {6}", "int64[1] six = {6}, float half = {0.5}")), 2, {"met.joined", "s"}),
    "tokens that meet, of a layer of which one part alone is read, unrotated too": (
        graph_texts.edited(
            MEET, (DIVIDED, "a = Slice(made, zero, two, one)"), ("rb = Rotate<block = 12>(b)", "rb = Neg(a)"),
            ("batch, 4, 24] z", "batch, 2, 24] z")), 2, {"met.joined"}),
    "tokens of two sources, one of which reads nothing": (
        graph_texts.edited(
            TOKENS, ("a = Relu(x)", f"a = Constant<value = float[1, 1, 24] {{{', '.join('12' * 12)}}}>()"),
            ("[batch, text, 24] c", "[1, text, 24] c"), ("[batch, both, 24] y", "[1, both, 24] y")),
        2, {"both.joined"}),
    "tokens that meet, below no layer": (graph_texts.edited(MEET, (MADE, "made = Relu(x)")), 2, {"met.joined", "b"}),
    "tokens that meet, of a layer that is read whole": (
        graph_texts.edited(MEET, ("4, 24] z)", "4, 24] z, float[batch, 6, 24] made)")), 2, {"met.joined", "b"}),
    "tokens that meet, of a layer with a part unrotated": (
        graph_texts.edited(MEET, ("(rb)", "(b)"), ("rb = Rotate<block = 12>(b)", "")), 2, {"met.joined"}),
    "a number, a Transpose and a Reshape": (LAYOUT, 1, {"a"}),
    "a number that divides": (graph_texts.edited(LAYOUT, ("Mul(half, a)", "Div(a, half)")), 1, {"a"}),
    "a Transpose of what has no known shape": (
        graph_texts.edited(
            LAYOUT, ("<float half", "<bool[3] yes = {1, 1, 1}, float half"),
            ("a = Relu(x)", "sizes = Shape(x) same = Compress(sizes, yes) a = Reshape(x, same)"),
            ("shaped = Reshape(turned, shape)", ""), ("(shaped)", "(turned)")), 1, {"a"}),
}  # fmt: skip


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def case(request, parse):
    text, moves, read = request.param
    return parse(text), moves, read


def rotations(traced):
    return [node for node in traced.graph.nodes if node.op == "HadamardRotate"]


def test_moves_up_and_keeps_the_function(case, difference):
    traced, moves, read = case
    before = traced.copy()
    result = commute_rotation(traced)
    assert result.fired == moves
    assert {skip.node for skip in result.skipped} <= {node.name for node in traced.graph.nodes}
    assert {node.inputs[0].name for node in rotations(traced)} == read
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


def test_moving_again_does_nothing(case):
    traced, *_ = case
    commute_rotation(traced)
    before = traced.to_onnx()
    assert commute_rotation(traced).fired == 0
    assert traced.to_onnx() == before


UNDONE = """
undone (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
<float half = {0.5}, int64[3] shape = {0, 0, 24}>
{
    there = Rotate<block = 8>(x)
    scaled = Mul(half, there)
    shaped = Reshape(scaled, shape)
    back = Rotate<block = 8>(shaped)
    y = Relu(back)
}
"""


@pytest.mark.parametrize(("signs", "left"), [("", []), (", seed = 1", [1])], ids=["without signs", "with signs"])
def test_a_rotation_that_meets_the_one_that_it_undoes_goes_with_it(parse, difference, signs, left):
    traced = parse(graph_texts.edited(UNDONE, ("there = Rotate<block = 8", "there = Rotate<block = 8" + signs)))
    before = traced.copy()
    assert commute_rotation(traced).fired == 2
    assert [node.attrs["block"] for node in rotations(traced)] == left
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


def test_the_order_of_nodes_and_names_do_not_matter(parse, case):
    traced, *_ = case
    orders = [traced.copy() for _ in range(3)]
    result = commute_rotation(traced)
    for seed, other in enumerate(orders):
        disguise(other.graph, random.Random(seed))
        found = commute_rotation(other)
        assert (found.fired, found.reasons()) == (result.fired, result.reasons())
        assert structure(other) == structure(traced)


OTHER_DOMAIN = [
    (PARTS, "a"), (PARTS, "b"), (SLICED, "b"), (CHANNELS, "both"), (TOKENS, "both"), (LAYOUT, "shaped"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name"), OTHER_DOMAIN)
def test_nothing_moves_past_a_node_of_another_domain(parse, text, name):
    traced = parse(text)
    (node,) = traced.graph.tensors()[name].inputs
    node.domain = "other"
    assert commute_rotation(traced).fired == 0


parts, sliced, channels, tokens, layout = (
    partial(graph_texts.edited, text) for text in (PARTS, SLICED, CHANNELS, TOKENS, LAYOUT)
)
# A rotation by a constant that is in no table.
ONES, WIDE_ONES = (f"<float[{width}] ones = {{{', '.join('1' * width)}}}>" for width in (24, 72))
BY_CONSTANT = "lrq.HadamardRotate<block = 12, base = 12, order = 11>"
NOT = {
    "one part alone is rotated": (
        parts(("rb = Rotate<block = 12>(b)", ""), ("(rb)", "(b)")),
        "what it rotates is also read elsewhere",
    ),
    "parts rotated in two ways": (
        parts(("rb = Rotate<block = 12>(b)", "rb = Rotate<block = 12, seed = 1>(b)")),
        "what it rotates is also read",
    ),
    "a part of which only the shape is read": (
        parts(
            ("rb = Rotate<block = 12>(b)", "z = Shape(b)"),
            ("z = Linear<rows = 24, cols = 24>(rb)", ""),
            ("float[batch, 4, 24] z", "int64[3] z"),
        ),
        None,
    ),
    "what is divided is read whole": (
        parts(("[batch, 4, 24] z", "[batch, 4, 24] z, float[batch, 6, 24] w"), ("ra =", "w = Neg(bent) ra =")),
        "what Split divides is also read elsewhere",
    ),
    "a part that is scaled twice, an output between": (
        parts(
            ("float[batch, 4, 24] z", "float[batch, 4, 24] z, float[batch, 4, 24] s"),
            ("rb = Rotate<block = 12>(b)", "s = Mul(b, half) t = Relu(s) rb = Rotate<block = 12>(t)"),
            ("int64[2] sizes = {2, 4}", "int64[2] sizes = {2, 4}, float half = {0.5}"),
        ),
        "what it rotates is an output",
    ),
    "a part is read in a branch": (
        parts(
            ("<int64[2] sizes = {2, 4}>", "<int64[2] sizes = {2, 4}, bool yes = {1}, float half = {0.5}>"),
            (
                "rb = Rotate<block = 12>(b)",
                "rb = If(yes) <then_branch = t () => (float[batch, 4, 24] tb) "
                "{ tb = Mul(b, half) }, else_branch = e () => (float[batch, 4, 24] eb) { eb = Neg(b) }>",
            ),
        ),
        "what it rotates is also read elsewhere",
    ),
    "another part is cut off in a branch": (
        sliced(
            ("int64[1] six = {6}", "int64[1] six = {6}, bool yes = {1}"),
            ("[batch, 4, 24] z", "[batch, 4, 24] z, float[batch, 2, 24] w"),
            (
                "ra =",
                "w = If(yes) <then_branch = t () => (float[batch, 2, 24] tw) { tw = Slice(bent, zero, two, one) }, "
                "else_branch = e () => (float[batch, 2, 24] ew) { ew = Slice(x, zero, two, one) }> ra =",
            ),
        ),
        "what Slice divides is also read in a branch",
    ),
    "what is divided is an output": (
        parts(("[batch, 4, 24] z", "[batch, 4, 24] z, float[batch, 6, 24] bent")),
        "what Split divides is an output of the graph",
    ),
    "an unrotated part is an output": (
        parts(("[batch, 4, 24] z", "[batch, 4, 24] z, float[batch, 2, 24] a")),
        "what it rotates is an output",
    ),
    "a rotated part is an output": (
        parts(("[batch, 4, 24] z", "[batch, 4, 24] z, float[batch, 4, 24] rb")),
        "the rotated tensor is an output",
    ),
    "what is rotated is an output, and nothing else": (
        layout(("r = Rotate", "y = Rotate"), ("y = Linear<rows = 24, cols = 24>(r)", "")),
        "the rotated tensor is an output",
    ),
    "a part whose tokens and channels change places": (
        parts(
            ("batch, 6, 24] x", "batch, 48, 24] x"),
            ("{2, 4}", "{24, 24}"),
            ("rb = Rotate<block = 12>(b)", "turned = Transpose<perm = [0, 2, 1]>(b) rb = Rotate<block = 12>(turned)"),
            ("batch, 2, 24] y", "batch, 24, 24] y"),
            ("batch, 4, 24] z", "batch, 24, 24] z"),
        ),
        "what it rotates is also read elsewhere",
    ),
    "a block in two sources": (channels(("block = 12", "block = 72")), "blocks of 72 channels straddle the parts"),
    "signs for all sources": (channels(("block = 12", "block = 12, seed = 1")), "its signs are drawn for all channels"),
    "concatenated channels that are read elsewhere": (
        channels(("24] y)", "24] y, float[batch, tokens, 72] z)"), ("rotated =", "z = Relu(both) rotated =")),
        "what it rotates is also read elsewhere",
    ),
    "tokens rotated in two ways": (
        tokens(("rc = Rotate<block = 12>", "rc = Rotate<block = 12, seed = 1>")),
        "not all tokens that a Concat joins",
    ),
    "tokens of no known shape": (
        tokens(
            ("a = Relu(x)", "a = Reshape(x, s)"),
            ("24] c)", "24] c, int64[n] s)"),
            ("rc = Rotate<block = 12>(c)", "d = Reshape(c, s) rc = Rotate<block = 12>(d)"),
        ),
        "Reshape does not keep the channels",
    ),
    "tokens of which some are not rotated": (
        tokens(("rc = Rotate<block = 12>(c)", "rc = Relu(c)")),
        "not all tokens that a Concat joins",
    ),
    "tokens rotated where one rotation folds": (tokens(("a = Relu(x)", "a = Kept<rows = 24, cols = 24>(x)")), None),
    "tokens of which some are an input": (
        tokens(("both = Concat<axis = 1>(rc, ra)", "both = Concat<axis = 1>(c, ra)")),
        "not all tokens that a Concat",
    ),
    "tokens of which some are read elsewhere": (
        tokens(("both, 24] y)", "both, 24] y, float[batch, text, 24] z)"), ("both =", "z = Relu(rc) both =")),
        "not all tokens that a Concat joins",
    ),
    "tokens of which some are an output": (
        tokens(("both, 24] y)", "both, 24] y, float[batch, text, 24] rc)")),
        "not all tokens that a Concat joins",
    ),
    "tokens joined by an output": (
        tokens(("both, 24] y)", "both, 24] y, float[batch, tokens, 24] ra)")),
        "not all tokens that a Concat joins",
    ),
    "rotated channels that meet": (
        tokens(
            ("Concat<axis = 1>(rc, ra)", "Concat<axis = -1>(rb, ra)"),
            ("rc = Rotate<block = 12>(c)", "rb = Rotate<block = 12>(x)"),
            ("cols = 24>(both)", "cols = 48>(both)"),
            ("both, 24] y", "tokens, 24] y"),
        ),
        None,
    ),
    "tokens rotated by signs of no table": (
        tokens(
            ("(float[batch, both, 24] y)", f"(float[batch, both, 24] y)\n{ONES}"),
            ("ra = Rotate<block = 12>(a)", f"ra = {BY_CONSTANT}(a, ones)"),
            ("rc = Rotate<block = 12>(c)", f"rc = {BY_CONSTANT}(c, ones)"),
        ),
        "its signs are not in the table of signs",
    ),
    "channels rotated by signs of no table": (
        channels(
            ("(float[batch, tokens, 24] y)", f"(float[batch, tokens, 24] y)\n{WIDE_ONES}"),
            ("Rotate<block = 12, width = 72>(both)", f"{BY_CONSTANT}(both, ones)"),
        ),
        "its signs are not in the table of signs",
    ),
    "a number before signs of no table": (
        layout(
            ("float half = {0.5}", ONES[1:-1] + ", float half = {0.5}"),
            ("Rotate<block = 12, seed = 3>(shaped)", f"{BY_CONSTANT}(scaled, ones)"),
            ("[tokens, batch, 24] y", "[batch, tokens, 24] y"),
        ),
        "its signs are not in the table of signs",
    ),
    "one part alone is there": (
        parts(
            ("rb = Rotate<block = 12>(b)", ""),
            ("z = Linear<rows = 24, cols = 24>(rb)", ""),
            (", float[batch, 4, 24] z", ""),
        ),
        None,
    ),
    "a third part is an output": (
        parts(
            ("a, b = Split<axis = 1>", "a, b, rest = Split<axis = 1>"),
            ("int64[2] sizes = {2, 4}", "int64[3] sizes = {2, 3, 1}"),
            ("batch, 4, 24] z", "batch, 3, 24] z, float[batch, 1, 24] rest"),
        ),
        "what it rotates is an output",
    ),
    "channels are divided": (
        parts(
            ("Split<axis = 1>", "Split<axis = -1>"),
            ("{2, 4}", "{12, 12}"),
            ("ra = Rotate<", "ra = Rotate<width = 12, "),
            ("rb = Rotate<", "rb = Rotate<width = 12, "),
            ("cols = 24>(ra)", "cols = 12>(ra)"),
            ("cols = 24>(rb)", "cols = 12>(rb)"),
            ("batch, 2, 24] y", "batch, 6, 24] y"),
            ("batch, 4, 24] z", "batch, 6, 24] z"),
        ),
        "its channels are divided, or axes that are not known: no Split of tokens alone",
    ),
    "channels are sliced": (
        sliced(
            ("one = {1}", "one = {2}"),
            ("two = {2}", "two = {12}"),
            ("six = {6}", "six = {24}"),
            ("ra = Rotate<", "ra = Rotate<width = 12, "),
            ("rb = Rotate<", "rb = Rotate<width = 12, "),
            ("cols = 24>(ra)", "cols = 12>(ra)"),
            ("cols = 24>(rb)", "cols = 12>(rb)"),
            ("batch, 2, 24] y", "batch, 6, 24] y"),
            ("batch, 4, 24] z", "batch, 6, 24] z"),
        ),
        "its channels are divided, or axes that are not known: no Slice of tokens alone",
    ),
    "tokens and channels are sliced": (
        sliced(
            ("int64[1] one = {1}, int64[1] two = {2}", "int64[2] one = {1, 2}, int64[2] two = {2, 12}"),
            ("int64[1] zero = {0}", "int64[2] zero = {0, 0}"),
            ("int64[1] six = {6}", "int64[2] six = {6, 24}"),
            ("ra = Rotate<", "ra = Rotate<width = 12, "),
            ("rb = Rotate<", "rb = Rotate<width = 12, "),
            ("cols = 24>(ra)", "cols = 12>(ra)"),
            ("cols = 24>(rb)", "cols = 12>(rb)"),
        ),
        "its channels are divided, or axes that are not known: no Slice of tokens alone",
    ),
    "axes are sliced that are fed": (
        sliced(
            (", int64[1] one = {1}", ""),
            ("24] x)", "24] x, int64[1] one)"),
            ("batch, 2, 24] y", "a, b, 24] y"),
            ("batch, 4, 24] z", "c, d, 24] z"),
        ),
        "its channels are divided, or axes that are not known: no Slice of tokens alone",
    ),
    "the first axes are sliced": (
        sliced(
            (", int64[1] one = {1}", ""),
            ("(bent, zero, two, one)", "(bent, zero, two)"),
            ("(bent, two, six, one)", "(bent, two, six)"),
            ("batch, 2, 24] y", "a, 6, 24] y"),
            ("batch, 4, 24] z", "b, 6, 24] z"),
        ),
        "its channels are divided, or axes that are not known: no Slice of tokens alone",
    ),
    "a square": (
        layout(
            ("Mul(half, a)", "Mul(a, a)"), ("(shaped)", "(scaled)"), ("[tokens, batch, 24] y", "[batch, tokens, 24] y")
        ),
        None,
    ),
    "a number that is divided": (
        layout(
            ("Mul(half, a)", "Div(half, a)"),
            ("(shaped)", "(scaled)"),
            ("[tokens, batch, 24] y", "[batch, tokens, 24] y"),
        ),
        None,
    ),
    "tokens and channels that change places": (
        layout(
            ("perm = [1, 0, 2]", "perm = [0, 2, 1]"),
            ("tokens, 24] x", "24, 24] x"),
            ("(shaped)", "(turned)"),
            ("[tokens, batch, 24] y", "[batch, 24, 24] y"),
        ),
        "Transpose does not keep the channels",
    ),
    "axes that are reversed": (
        layout(
            ("Transpose<perm = [1, 0, 2]>", "Transpose"),
            ("[batch, tokens, 24] x", "[24, tokens, batch] x"),
            ("(shaped)", "(turned)"),
            ("[tokens, batch, 24] y", "[batch, tokens, 24] y"),
        ),
        "Transpose does not keep the channels",
    ),
    "sizes that are not known": (
        layout(
            ("shaped = Reshape(turned, shape)", "any = Reshape(turned, s) shaped = Reshape(any, s)"),
            ("24] x)", "24] x, int64[3] s)"),
            ("[tokens, batch, 24] y", "[a, b, 24] y"),
        ),
        "Reshape does not keep the channels",
    ),
    "no shape that is known": (
        layout(
            ("shaped = Reshape(turned, shape)", "any = Reshape(turned, s) shaped = Reshape(any, s)"),
            ("24] x)", "24] x, int64[n] s)"),
            ("[tokens, batch, 24] y", "[a, b, 24] y"),
        ),
        "Reshape does not keep the channels",
    ),
    "a shape that was known": (
        layout(
            ("shaped = Reshape(turned, shape)", "shaped = Reshape(turned, s)"),
            ("24] x)", "24] x, int64[n] s)"),
            ("[tokens, batch, 24] y", "[a, b, 24] y"),
        ),
        "Reshape does not keep the channels",
    ),
    "a shape that was not known": (
        layout(
            ("shaped = Reshape(turned, shape)", "any = Reshape(turned, s) shaped = Reshape(any, shape)"),
            ("shape = {0, 0, 24}", "shape = {5, 2, 24}"),
            ("24] x)", "24] x, int64[n] s)"),
            ("[tokens, batch, 24] y", "[5, 2, 24] y"),
        ),
        "Reshape does not keep the channels",
    ),
    "parts of no known shape": (
        parts(("bent = Relu(x)", "bent = Reshape(x, s)"), ("24] x)", "24] x, int64[n] s)")),
        "its channels are divided, or axes that are not known: no Split of tokens alone",
    ),
    "channels of no known shape": (
        channels(("a = Relu(x)", "a = Reshape(x, s)"), ("24] x)", "24] x, int64[n] s)")),
        None,
    ),
    "channels of which some have no known shape": (
        channels(
            ("a = Relu(x)", "a = Reshape(x, s)"),
            ("24] x)", "24] x, int64[n] s)"),
            ("24] y)", "24] y)\n<float[batch, tokens, 72] both>"),
        ),
        "blocks of 12 channels straddle",
    ),
    "channels of which some are not known": (
        channels(("a = Relu(x)", "a = Reshape(x, s)"), ("24] x)", "24] x, int64[3] s)")),
        "blocks of 12 channels straddle",
    ),
    "channels that move": (
        layout(
            ("perm = [1, 0, 2]", "perm = [0, 2, 1]"),
            ("shape = {0, 0, 24}", "shape = {0, -1, 24}"),
            ("[tokens, batch, 24] y", "[b, t, 24] y"),
        ),
        "Reshape does not keep the channels",
    ),
    "a vector of factors": (
        layout(
            ("float half = {0.5}", "float[1, 24] half = {" + ", ".join("12" * 12) + "}"),
            ("(shaped)", "(scaled)"),
            ("[tokens, batch, 24] y", "[batch, tokens, 24] y"),
        ),
        None,
    ),
}


@pytest.mark.parametrize(("text", "reason"), NOT.values(), ids=NOT.keys())
def test_does_not_fire_and_says_why(parse, text, reason):
    traced = parse(text)
    check(traced)
    before = to_text(traced.to_onnx())
    result = commute_rotation(traced)
    assert result.fired == 0
    assert to_text(traced.to_onnx()) == before
    assert reason is None or any(found.startswith(reason) for found in result.reasons()), result.reasons()


def test_numbers_of_channels_that_have_no_name_may_differ(parse):
    traced = parse(LAYOUT)
    for name in ("turned", "shaped"):
        traced.graph.tensors()[name].shape = ["tokens", "batch", None]
    result = commute_rotation(traced)
    assert result.fired == 0
    assert list(result.reasons()) == ["Reshape does not keep the channels on the last axis"]


def test_each_source_gets_its_own_divisors(parse):
    traced = parse(graph_texts.edited(CHANNELS, ("width = 72", "width = 72, equalized = 4")))
    (whole,) = (each.equalizer for each in traced.signs.values())
    commute_rotation(traced)
    found = {node.inputs[0].name: traced.signs[node.inputs[1].name].equalizer for node in rotations(traced)}
    assert found == {"a": part(whole, 0, 24), "b": part(whole, 24, 72)}


def test_a_part_of_an_equalizer_has_its_divisors():
    text = encode(np.array([1.0, 2.0, 0.5, 256.0]))
    assert divisors(part(text, 1, 3)).tolist() == [2.0, 0.5]


def test_a_wrong_move_changes_the_function(parse, difference):
    before = parse(CHANNELS)
    traced = before.copy()
    commute_rotation(traced)
    one, other = rotations(traced)
    one.attrs, other.attrs = one.attrs | {"block": 4, "base": 1, "order": 0}, other.attrs
    assert difference(before, traced) > 1e-3


def test_a_rotation_whose_shape_is_read_moves_and_the_shape_stays(parse, difference):
    text = graph_texts.edited(
        TOKENS,
        ("both, 24] y)", "both, 24] y, int64[1] size)"),
        ("both =", "size = Shape<start = 1, end = 2>(ra) both ="),
    )
    traced = parse(text)
    before = traced.copy()
    assert commute_rotation(traced).fired == 2
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


def test_rotations_by_computed_signs_are_not_taken_for_equal(parse):
    rotate = "lrq.HadamardRotate<block = 12, base = 12, order = 11>"
    text = graph_texts.edited(
        TOKENS, ("text, 24] c)", "text, 24] c, float[24] s, float[24] t)"),
        ("ra = Rotate<block = 12>(a)", f"ra = {rotate}(a, s)"), ("rc = Rotate<block = 12>(c)", f"rc = {rotate}(c, t)"),
    )  # fmt: skip
    traced = parse(text)
    result = commute_rotation(traced)
    assert result.fired == 0
    assert set(result.reasons()) == {"its signs are not in the table of signs"}


def test_a_concat_in_a_branch_is_left_alone(parse):
    text = """
    branch (float[batch, tokens, 24] x, bool yes) => (float[batch, both, 24] y)
    {
        a = Relu(x)
        ra = Rotate<block = 12>(a)
        y = If(yes) <then_branch = t () => (float[batch, both, 24] ty) { ty = Concat<axis = 1>(ra) },
                     else_branch = e () => (float[batch, both, 24] ey) { ey = Concat<axis = 1>(x, x) }>
    }"""
    traced = parse(text)
    before = traced.to_onnx()
    assert commute_rotation(traced).fired == 0
    check(traced)
    assert traced.to_onnx() == before


@pytest.mark.parametrize("text", [PARTS, SLICED, CHANNELS, TOKENS], ids=["parts", "slices", "channels", "tokens"])
def test_what_was_moved_reads_nothing_where_it_was(parse, text):
    """It would count as another reader and keep later passes from folding."""
    traced = parse(text)
    assert commute_rotation(traced).fired
    for tensor in traced.graph.tensors().values():
        for reader in tensor.outputs:
            assert any(reader is node for node in traced.graph.nodes), reader.name
