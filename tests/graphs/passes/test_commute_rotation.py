import random

import graph_texts
import numpy as np
import pytest
from graph_structure import disguise, structure
from rotation_texts import CHANNELS, DIVIDED, GONE, LAYOUT, MADE, MEET, PARTS, SLICED, TOKENS

from graphs.checks import check, check_preserved
from graphs.equalizer import divisors, encode, part
from graphs.passes import commute_rotation

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


@pytest.mark.parametrize("text", [PARTS, SLICED, CHANNELS, TOKENS], ids=["parts", "slices", "channels", "tokens"])
def test_what_was_moved_reads_nothing_where_it_was(parse, text):
    """It would count as another reader and keep later passes from folding."""
    traced = parse(text)
    assert commute_rotation(traced).fired
    for tensor in traced.graph.tensors().values():
        for reader in tensor.outputs:
            assert any(reader is node for node in traced.graph.nodes), reader.name
