from functools import partial

import graph_texts
import pytest
from onnx.printer import to_text
from rotation_texts import CHANNELS, LAYOUT, PARTS, SLICED, TOKENS

from graphs.checks import check
from graphs.passes import commute_rotation

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
        "some of the rotated tokens that a Concat joins are also read elsewhere",
    ),
    "tokens of which some are an output": (
        tokens(("both, 24] y)", "both, 24] y, float[batch, text, 24] rc)")),
        "some of the rotated tokens that a Concat joins are also read elsewhere",
    ),
    "tokens joined by an output": (
        tokens(("both, 24] y)", "both, 24] y, float[batch, tokens, 24] ra)")),
        "some of the rotated tokens that a Concat joins are also read elsewhere",
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
