"""What a rotation folds through on its way up to the weights, and what it stops at: `graphs.passes.channels`."""

import pytest
from onnx.printer import to_text

from graphs.checks import check, check_preserved
from graphs.expressions import Expression
from graphs.passes import fold_rotation_into_producer

MADE = "made = Kept<rows = 24, cols = 20>(x)"


def climb(
    steps: str, made: str = MADE, x: str = "batch, 8, 20", y: str = "batch, 8, 24", width: int = 24, block: int = 12,
    inputs: str = "", outputs: str = "", numbers: str = "int64 nought = {0}",
) -> str:  # fmt: skip
    """A layer, `steps` from its output `made` to `top`, and the rotation of that."""
    return f"""
    climb (float[{x}] x{inputs}) => (float[{y}] y{outputs})
    <float half = {{0.5}}, float[1, 1, 1, 1] half4 = {{0.5}}, float[24] factors = {{{", ".join("12" * 12)}}},
     int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] six = {{6}}, int64[1] twelve = {{12}},
     int64[1] last = {{-1}}, int64[1] tokens = {{-2}}, int64[4] heads = {{0, 0, 2, 12}}, int64[3] merge = {{0, 0, 24}},
     {numbers}>
    {{
        {made}
        {steps}
        r = Rotate<block = {block}, width = {width}, seed = 7>(top)
        y = Relu(r)
    }}"""


WIDE = MADE.replace("24", "48")
FIRES = {
    "an Identity": climb("top = Identity(made)"),
    "a cast to its own type": climb("top = Cast<to = 1>(made)"),
    "a number": climb("top = Mul(made, half)"),
    "a number on the left": climb("top = Mul(half, made)"),
    "a number that divides": climb("top = Div(made, half)"),
    "axes that are reversed twice": climb("turned = Transpose(made) top = Transpose(turned)"),
    "tokens of two layers": climb(
        "more = Kept<rows = 24, cols = 20, bias = 0>(x) top = Concat<axis = -2>(made, more)", y="batch, 16, 24"),
    "some of the tokens": climb("top = Slice(made, two, six, tokens)", y="batch, 4, 24"),
    "some of the tokens, the others unread": climb(
        "top, rest = Split<axis = -2, num_outputs = 2>(made)", y="batch, 4, 24"),
    "some of the samples, the others unread": climb(
        "top, rest = Split<num_outputs = 2>(made)", x="6, 20", y="3, 24"),
    "some of the channels": climb("rest, top = Split<axis = 2, num_outputs = 2>(made)", made=WIDE),
    "some of the channels of a layer, from within a block on": climb(
        "rest, top, more = Split<axis = 2>(made, parts)", numbers="int64[3] parts = {6, 12, 6}", y="batch, 8, 12",
        width=12),
    "some of the heads of attention": climb(
        "split = Reshape(made, four) turned = Transpose<perm = [0, 2, 1, 3]>(split) mixed = MatMul(p, turned) "
        "back = Transpose<perm = [0, 2, 1, 3]>(mixed) whole = Reshape(back, both) "
        "rest, top = Split<axis = 2, num_outputs = 2>(whole)",
        made=WIDE, inputs=", float[batch, 4, 8, 8] p",
        numbers="int64[4] four = {0, 0, 4, 12}, int64[3] both = {0, 0, 48}"),
    "some of the channels, the others an output": climb(
        "rest, top = Split<axis = 2, num_outputs = 2>(made)", made=WIDE, outputs=", float[batch, 8, 24] rest"),
    "a single row": climb("top = Reshape(made, row)", x="20", y="1, 24", numbers="int64[2] row = {1, 24}"),
    "heads": climb("split = Reshape(made, heads) top = Reshape(split, merge)"),
    "a mix of tokens": climb("top = MatMul(p, made)", inputs=", float[batch, 8, 8] p"),
}  # fmt: skip


@pytest.mark.parametrize("text", FIRES.values(), ids=FIRES.keys())
def test_folds_and_keeps_the_function(parse, difference, text):
    traced = parse(text)
    before = traced.copy()
    assert fold_rotation_into_producer(traced).fired == 1
    assert not any(node.op == "HadamardRotate" for node in traced.graph.nodes)
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


@pytest.mark.parametrize("text", FIRES.values(), ids=FIRES.keys())
def test_a_node_of_another_domain_stops_it(parse, text):
    traced = parse(text)
    (node,) = traced.graph.tensors()["top"].inputs
    node.domain = "other"
    assert list(fold_rotation_into_producer(traced).reasons()) == [
        f"{node.op} computes what it rotates, no linear layer"
    ]


NO_RESHAPE, NO_MIX = "Reshape from", "MatMul computes what it rotates, neither a linear layer nor a mix of tokens"
NO_LAYER = "Add computes what it rotates, no linear layer"
TOP = "float[batch, 8, 24] top"  # its shape is declared, where none could be inferred
NARROW = "made = Kept<rows = 12, cols = 20>(x)"
STOPS = {
    "what it rotates has no known shape": {
        "what is rotated": climb("top = Reshape(made, s)", inputs=", int64[n] s", y="a, b, c"),
        "what it is made of": climb(
            "any = Reshape(made, s) top = Slice(any, zero, two, zero)", inputs=", int64[n] s", y="a, b, c"
        ),
        "what is scaled": climb("any = Reshape(made, s) top = Mul(any, half)", inputs=", int64[n] s", numbers=TOP),
        "what a bias is added to": climb(
            "any = Reshape(made, s) top = Add(any, bias)", inputs=", int64[n] s, float[24] bias", numbers=TOP
        ),
    },
    "Cast rounds": {"half of the digits": climb("low = Cast<to = 10>(made) top = Cast<to = 1>(low)")},
    "Mul computes what it rotates, and not with one number": {
        "a factor for every channel": climb("top = Mul(made, factors)"),
        "a square": climb("top = Mul(made, made)"),
    },
    "Div computes what it rotates, and not with one number": {
        "a number that is divided": climb("top = Div(half, made)"),
    },
    "Mul adds axes": {"a number of four axes": climb("top = Mul(made, half4)", y="1, batch, 8, 24")},
    "Concat joins channels": {
        f"along {axis}": climb(
            f"more = Kept<rows = 24, cols = 20>(x) top = Concat<axis = {axis}>(made, more)", y="batch, 8, 48", width=48
        )
        for axis in (2, -1)
    },
    "Slice cuts along axes that are not known": {
        "axes that are fed": climb("top = Slice(made, two, six, s)", inputs=", int64[1] s", y="a, b, 24"),
        "the first axes, by default": climb("top = Slice(made, zero, one)", y="b, 8, 24"),
    },
    "Slice takes some of the channels": {
        "the last axis": climb("top = Slice(made, zero, twelve, last)", y="batch, 8, 12", width=12),
    },
    "Split hands other tokens to other readers": {
        "a reader": climb(
            "top, rest, w = Split<axis = 1, num_outputs = 3>(made) z = Relu(rest)",
            x="batch, 9, 20",
            y="batch, 3, 24",
            outputs=", float[batch, 3, 24] z",
        ),
        "an output": climb(
            "top, rest, w = Split<axis = -2, num_outputs = 3>(made)",
            x="batch, 9, 20",
            y="batch, 3, 24",
            outputs=", float[batch, 3, 24] rest",
        ),
    },
    "Split takes some of the heads": {
        "two of four": climb(
            "split = Reshape(made, four) part, rest = Split<axis = 2, num_outputs = 2>(split) "
            "top = Reshape(part, half_width)",
            y="batch, 8, 12",
            width=12,
            numbers="int64[4] four = {0, 0, 4, 6}, int64[3] half_width = {0, 0, 12}",
        ),
    },
    "Split makes parts of unknown sizes": {
        "of an unknown size": climb(
            "any = Reshape(made, s) top, rest = Split<axis = 2, num_outputs = 2>(any)",
            inputs=", int64[3] s",
            y="a, b, 24",
        ),
    },
    "blocks of 12 channels, from channel 6 on, straddle heads of width 12": {
        "a part that begins within a head": climb(
            "split = Reshape(made, heads) turned = Transpose<perm = [0, 2, 1, 3]>(split) mixed = MatMul(p, turned) "
            "back = Transpose<perm = [0, 2, 1, 3]>(mixed) whole = Reshape(back, merge) "
            "before, top, after = Split<axis = 2>(whole, parts)",
            inputs=", float[batch, 2, 8, 8] p",
            numbers="int64[3] parts = {6, 12, 6}",
            y="batch, 8, 12",
            width=12,
        ),
    },
    "Split takes a part of a part": {
        "one of two": climb(
            "u, v = Split<axis = 2, num_outputs = 2>(made) w = Kept<rows = 48, cols = 20, bias = 0>(x) "
            "both = Concat<axis = 1>(w, v) rest, top = Split<axis = 2, num_outputs = 2>(both)",
            made=MADE.replace("24, cols", "96, bias = 0, cols"),
            y="batch, 16, 24",
        ),
    },
    NO_LAYER: {
        "a bias of every head": climb(
            "split = Reshape(made, heads) sum = Add(split, bias) top = Reshape(sum, merge)", inputs=", float[12] bias"
        ),
        "a number": climb("top = Add(made, half)"),
        "a position embedding": climb(
            "top = Add(made, bias)", x="batch, 24, 20", y="batch, 24, 24", inputs=", float[24, 24] bias"
        ),
        "a bias of one number": climb("top = Add(made, bias)", inputs=", float[1] bias"),
        "a residual": climb("u = Kept<rows = 24, cols = 20>(x) top = Add(made, u)"),
    },
    "Add stretches": {
        "a column": climb(
            "top = Add(made, bias)", made="made = Kept<rows = 1, cols = 20, bias = 0>(x)", inputs=", float[24] bias"
        ),
    },
    "a linear layer computes it, but not its channels alone": {
        "tokens": climb(
            "top = Transpose<perm = [0, 2, 1]>(made)",
            made=MADE.replace("rows = 24", "bias = 0, rows = 24"),
            x="batch, 24, 20",
            y="batch, 24, 24",
        ),
    },
    "the weight of the linear layer before it is not in the tables": {
        "an input": climb("t = Transpose<perm = [1, 0]>(w) top = MatMul(x, t)", inputs=", float[24, 20] w"),
    },
    "the weight of the linear layer before it is also read elsewhere": {
        "the weight": climb("z = Neg(made_weight) top = Identity(made)", outputs=", float[24, 20] z"),
        "its transpose": climb("z = Neg(made_wt) top = Identity(made)", outputs=", float[20, 24] z"),
        "its transpose, an output": climb("top = Identity(made)", outputs=", float[20, 24] made_wt"),
        "the decoded weight": climb(
            "z = Neg(made_w) top = Identity(made)", made=MADE.replace("Kept", "Linear"), outputs=", float[24, 20] z"
        ),
    },
    NO_MIX: {
        "values of no known shape": climb(
            "any = Reshape(made, s) top = MatMul(p, any)", inputs=", int64[n] s, float[batch, 8, 8] p", numbers=TOP
        ),
        "values that are stretched": climb(
            "top = MatMul(p, made)", inputs=", float[2, batch, 8, 8] p", y="2, batch, 8, 24"
        ),
        "channels that are mixed": climb(
            "turned = Transpose<perm = [0, 2, 1]>(made) mixed = MatMul(p, turned) "
            "top = Transpose<perm = [0, 2, 1]>(mixed)",
            inputs=", float[batch, 24, 24] p",
        ),
        "heads that are mixed": climb(
            "split = Reshape(made, heads) mixed = MatMul(p, split) top = Reshape(mixed, merge)",
            inputs=", float[batch, 8, 2, 2] p",
        ),
    },
    "attention shares its values": {
        "one for two heads": climb(
            "split = Reshape(made, one_head) mixed = MatMul(p, split) turned = Transpose<perm = [0, 2, 1, 3]>(mixed) "
            "top = Reshape(turned, merge)",
            made=NARROW,
            inputs=", float[batch, 2, 8, 8] p",
            numbers="int64[4] one_head = {0, 1, 8, 12}",
        ),
    },
    "the width of a head is not known": {
        "values of unknown sizes": climb(
            "split = Reshape(made, s) top = MatMul(p, split)",
            inputs=", int64[4] s, float[batch, 2, 8, 8] p",
            y="batch, 2, 8, w",
        ),
    },
    NO_RESHAPE: {
        "heads of which tokens are a part": climb(
            "split = Reshape(made, wrong) turned = Transpose<perm = [0, 2, 1, 3]>(split) top = Reshape(turned, merge)",
            numbers="int64[4] wrong = {0, 2, 8, 12}",
        ),
        "an unknown number behind": climb(
            "split = Reshape(made, wrong) top = Transpose<perm = [0, 2, 1]>(split)",
            x="batch, tokens, 20",
            y="batch, a, 24",
            numbers="int64[3] wrong = {0, 24, -1}",
        ),
        "another number behind": climb(
            "split = Reshape(made, wrong) top = Transpose<perm = [0, 2, 1]>(split)",
            numbers="int64[3] wrong = {0, 24, 8}",
        ),
        "one channel": climb(
            "split = Reshape(made, wrong) top = Reshape(split, wrong)",
            made=MADE.replace("24", "1"),
            width=1,
            block=1,
            y="batch, 8, 1",
            numbers="int64[3] wrong = {0, 8, 1}",
        ),
    },
    "Reshape from ? to [2, 8, 24]": {
        "nothing known": climb(
            "any = Reshape(made, s) top = Reshape(any, whole)",
            inputs=", int64[n] s",
            y="2, 8, 24",
            numbers="int64[3] whole = {2, 8, 24}",
        ),
    },
}


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        pytest.param(reason, text, id=f"{reason}: {case}")
        for reason, cases in STOPS.items()
        for case, text in cases.items()
    ],
)
def test_stops_and_says_why(parse, reason, text):
    traced = parse(text)
    for tensor in traced.graph.inputs:
        if tensor.name == "bias":
            traced.tensors["bias"] = Expression("bias", tuple(tensor.shape))
    check(traced)
    before = to_text(traced.to_onnx())
    result = fold_rotation_into_producer(traced)
    assert result.fired == 0
    (found,) = result.reasons()
    assert found.startswith(reason)
    assert to_text(traced.to_onnx()) == before
