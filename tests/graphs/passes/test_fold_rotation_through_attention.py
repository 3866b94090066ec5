import numpy as np
import pytest
from graph_texts import ATTENTION, edited

from graphs.checks import check, check_preserved
from graphs.equalizer import encode
from graphs.expressions import RotateOutput
from graphs.passes import fold_rotation_into_producer

SELF = edited(
    ATTENTION, ("(merged)", "(rotated)"), ("y = Linear", "rotated = Rotate<block = 12, seed = 7>(merged) y = Linear")
)
WHOLE_HEAD, V = "Rotate<block = 12, seed = 7>", "v = Linear<rows = 24, cols = 24>(x)"
MORE_OUTPUTS = "(float[batch, tokens, 24] y, float[batch, tokens, 24] {})"


CROSS = edited(
    SELF,
    ("24] x)", "24] x, float[batch, text, 20] caption)"),
    ("k = Linear<rows = 24, cols = 24>(x)", "k = Linear<rows = 24, cols = 20>(caption)"),
    (V, "v = Linear<rows = 24, cols = 20>(caption)"),
)
FIRES = {
    "self-attention": SELF,
    "cross-attention": CROSS,
    "masked": edited(
        SELF,
        ("24] x)", "24] x, float[batch, 1, 1, tokens] mask)"),
        ("p = Softmax(scores)", "masked = Add(scores, mask) p = Softmax(masked)"),
    ),
    "no bias": edited(SELF, (V, "v = Linear<rows = 24, cols = 24, bias = 0>(x)")),
    "no signs": edited(SELF, (WHOLE_HEAD, "Rotate<block = 12>")),
    "an equalized input": edited(SELF, (WHOLE_HEAD, "Rotate<block = 12, seed = 7, equalized = 1>")),
    "equalizing alone": edited(SELF, (WHOLE_HEAD, "Rotate<block = 1, equalized = 1>")),
    "a divisor of the head width": edited(SELF, (WHOLE_HEAD, "Rotate<block = 4, seed = 7>")),
    "an 8-bit value": edited(SELF, (V, "v = Linear<rows = 24, cols = 24, bits = 8>(x)")),
    "a rotated input": edited(SELF, (V, "rx = Rotate<block = 24>(x) v = Linear<rows = 24, cols = 24>(rx)")),
    "two readers of the rotation": edited(
        SELF, ("24] y)", "24] y, float[batch, tokens, 24] z)"), ("(rotated)", "(rotated) z = Relu(rotated)")
    ),
    "one reader reading it twice": edited(
        SELF, ("24] y)", "24] y, float[batch, tokens, 24] z)"), ("(rotated)", "(rotated) z = Mul(rotated, rotated)")
    ),
    "a value in floating point": edited(SELF, (V, "v = Kept<rows = 24, cols = 24>(x)")),
    "a scaled value": edited(
        SELF,
        ("p, vh)", "p, vs)"),
        ("p = Softmax", "vs = Mul(vh, half) p = Softmax"),
        ("int64[3] merge", "float half = {0.5}, int64[3] merge"),
    ),
    "queries, keys and values of one layer": edited(
        SELF,
        ("q = Linear<rows = 24, cols = 24>(x)", "qkv = Linear<rows = 72, cols = 24>(x)"),
        ("k = Linear<rows = 24, cols = 24>(x)", "q, k, v = Split<axis = -1, num_outputs = 3>(qkv)"),
        (V, ""),
    ),
    "some of the tokens": edited(
        SELF,
        ("(merged)", "(few)"),
        ("rotated =", "few = Slice(merged, zero, two, one) rotated ="),
        ("int64[3] merge", "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[3] merge"),
    ),
    "bias on the left of its Add": SELF.replace("Linear<", "Linear<bias_first = 1, "),
}


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def traced(request, parse):
    return parse(request.param)


def test_folds_and_keeps_the_function(traced, difference):
    before = traced.copy()
    assert fold_rotation_into_producer(traced).fired == 1
    rotations = [node for node in traced.graph.nodes if node.op == "HadamardRotate"]
    assert "merged" not in [node.inputs[0].name for node in rotations]
    tables = [*traced.tensors.values(), *(each.weight for each in traced.linears.values())]
    assert any(isinstance(step, RotateOutput) for each in tables for step in each.maps)
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-10


def test_folding_again_does_nothing(traced):
    fold_rotation_into_producer(traced)
    before = traced.to_onnx()
    assert fold_rotation_into_producer(traced).fired == 0
    assert traced.to_onnx() == before


REFUSALS = {
    "block straddles heads": ([(WHOLE_HEAD, "Rotate<block = 24>")], "blocks of 24 channels straddle heads of width 12"),
    "block does not divide the head": ([(WHOLE_HEAD, "Rotate<block = 8>")], "blocks of 8 channels straddle"),
    "value leaves the graph": ([("(float[batch, tokens, 24] y)", MORE_OUTPUTS.format("v"))], "is also read elsewhere"),
    "value is read twice": (
        [("(float[batch, tokens, 24] y)", MORE_OUTPUTS.format("z")), ("v4 =", "z = Relu(v) v4 =")],
        "the output of Add is also read elsewhere",
    ),
    "heads are read elsewhere": (
        [("(float[batch, tokens, 24] y)", MORE_OUTPUTS.format("z")), ("rotated =", "z = Relu(merged) rotated =")],
        "the output of Reshape is also read elsewhere",
    ),
    "values multiply themselves": (
        [("mixed = MatMul(p, vh)", "t = Transpose<perm = [0, 1, 3, 2]>(vh) w = MatMul(vh, t) mixed = MatMul(w, vh)")],
        "the output of Transpose is also read elsewhere",
    ),
    "rotated tensor leaves the graph": (
        [("(float[batch, tokens, 24] y)", MORE_OUTPUTS.format("rotated"))],
        "the rotated tensor is an output of the graph",
    ),
    "channels merge interleaved": (
        [("back = Transpose<perm = [0, 2, 1, 3]>", "back = Transpose<perm = [0, 2, 3, 1]>")],
        "MatMul computes what it rotates, neither a linear layer nor a mix of tokens",
    ),
    "heads do not merge": (
        [("merge = {0, 0, 24}", "merge = {0, -1, 12}"), (WHOLE_HEAD, "Rotate<block = 12, width = 12>"),
         ("y = Linear<rows = 24, cols = 24>", "y = Linear<rows = 24, cols = 12>")],
        "Reshape from ['batch', 'tokens', 24] to ['batch', 'tokens', 2, 12] does not keep",
    ),
    "unknown heads": (
        [("24] x)", "24] x, int64[4] split)"), ("int64[4] split = {0, 0, 2, 12}, ", "")],
        "does not keep the channels together",
    ),
    "two values in one projection": (
        [("k = Linear<rows = 24", "k = Linear<rows = 48"), ("v = Linear<rows = 24", "v = Linear<rows = 48"),
         ("k4 = Reshape(k, split)", "k4 = Reshape(k, long)"), ("v4 = Reshape(v, split)", "v4 = Reshape(v, long)"),
         ("<int64[4] split", "<int64[4] long = {0, -1, 2, 12}, int64[4] split")],
        "Reshape from ['batch', 'tokens', 48] to",
    ),
    "not behind an attention": (
        [("rotated =", "active = Relu(merged) rotated ="), (">(merged)", ">(active)")],
        "Relu computes what it rotates, no linear layer",
    ),
    "behind an input": (
        [(">(merged)", ">(x)")],
        "an input of the graph is what it rotates, no linear layer computes it",
    ),
    "value is no layer": (
        [("24] x)", "24] x, float[24, 24] w)"), (V, "v = MatMul(x, w)")],
        "MatMul computes what it rotates, neither a linear layer nor a mix of tokens",
    ),
    "value has a residual": (
        [(V, "u = Linear<rows = 24, cols = 24>(x) v = Add(u, x)")],
        "Add computes what it rotates, no linear layer",
    ),
    "weight is read twice": (
        [("(float[batch, tokens, 24] y)", MORE_OUTPUTS.format("z")), ("q4 =", "z = MatMul(x, v_wt) q4 =")],
        "the weight of the linear layer before it is also read elsewhere",
    ),
    "bias is read twice": (
        [("(float[batch, tokens, 24] y)", MORE_OUTPUTS.format("z")), ("q4 =", "z = Add(x, v_bias) q4 =")],
        "the layer's bias is not a weight of its own",
    ),
    "bias is a model input": (
        [("24] x)", "24] x, float[24] b)"), (V, "u = Linear<rows = 24, cols = 24, bias = 0>(x) v = Add(u, b)")],
        "the layer's bias is not a weight of its own",
    ),
    "a cast that rounds": (
        [
            (">(merged)", ">(round)"),
            ("rotated =", "whole = Cast<to = 6>(merged) round = Cast<to = 1>(whole) rotated ="),
        ],
        "Cast rounds what it rotates",
    ),
    "a bias that stretches": (
        [(V, "u = Linear<rows = 1, cols = 24, bias = 0>(x) wide = Linear<rows = 24, cols = 24>(x) "
             "v = Add(u, wide_bias)"),
         ("(float[batch, tokens, 24] y)", MORE_OUTPUTS.format("wide"))],
        "the layer's bias is not a weight of its own",
    ),
    "heads share their values": (
        [("k = Linear<rows = 24", "k = Linear<rows = 12"), ("v = Linear<rows = 24", "v = Linear<rows = 12"),
         ("k4 = Reshape(k, split)", "k4 = Reshape(k, one)"), ("v4 = Reshape(v, split)", "v4 = Reshape(v, one)"),
         ("<int64[4] split", "<int64[4] one = {0, 0, 1, 12}, int64[4] split")],
        "attention shares its values between heads",
    ),
    "two parts of one layer": (
        [(V, "uw = Linear<rows = 48, cols = 24>(x) u, w = Split<axis = -1, num_outputs = 2>(uw) "
             "v = Concat<axis = 1>(u, w)"),
         ("k = Linear<rows = 24, cols = 24>(x)", "l = Linear<rows = 24, cols = 24>(x) k = Concat<axis = 1>(l, l)")],
        "two parts of one weight compute what it rotates",
    ),
    "a part of a part": (
        [(V, "uv = Linear<rows = 96, cols = 24>(x) u, w = Split<axis = -1, num_outputs = 2>(uv) "
             "v, s = Split<axis = -1, num_outputs = 2>(w)")],
        "Split takes a part of a part",
    ),
    "signs are computed": (
        [("24] x)", "24] x, float[24] s)"),
         (WHOLE_HEAD + "(merged)", "lrq.HadamardRotate<block = 12, base = 12, order = 11>(merged, s)")],
        "its signs are not in the table of signs",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_and_says_why(edits, reason, parse):
    traced = parse(edited(SELF, *edits))
    check(traced)
    before = traced.to_onnx()
    result = fold_rotation_into_producer(traced)
    assert result.fired == 0
    assert len(result.skipped) == 1
    assert reason in result.skipped[0].reason
    assert traced.to_onnx() == before


@pytest.fixture
def folded(parse):
    before = parse(SELF)
    after = before.copy()
    fold_rotation_into_producer(after)
    return before, after


@pytest.mark.parametrize(
    "wrong",
    [RotateOutput(4, 7), RotateOutput(12, None), RotateOutput(12, 8), RotateOutput(12, 7, encode(np.full(24, 1.5)))],
    ids=["another block", "lost signs", "another seed", "equalized without a reader"],
)
def test_a_wrong_map_is_caught(wrong, folded, difference):
    before, after = folded
    after.linears["v.codes"], after.tensors["v_bias"] = before.linears["v.codes"], before.tensors["v_bias"]
    after.rotate_outputs({"v.codes": wrong, "v_bias": wrong})
    assert difference(before, after) > 1e-2


def test_a_forgotten_bias_is_caught(folded, difference):
    before, after = folded
    after.tensors["v_bias"] = before.tensors["v_bias"]
    assert difference(before, after) > 1e-3


def test_a_transposed_rotation_is_caught(folded, difference, weights):
    before, after = folded
    plain, rotated = (weights(each)["v.codes.float"].astype(np.float64) for each in (before, after))
    rotation = plain @ np.linalg.inv(rotated)  # R, of W' = Rᵀ W

    def transpose(fed):
        fed["v.codes.float"] = (rotation @ plain).astype(np.float32)

    assert difference(before, after) <= 1e-10
    assert difference(before, after, transpose) > 1e-2


# One node, as exporters of opset 23 and later write an attention; heads are split inside, or before.
FUSED = """
fused (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    q = Linear<rows = 24, cols = 24>(x)
    k = Linear<rows = 24, cols = 24>(x)
    v = Linear<rows = 24, cols = 24>(x)
    mixed = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)
    rotated = Rotate<block = 12, seed = 7>(mixed)
    y = Linear<rows = 24, cols = 24>(rotated)
}
"""
FUSED_HEADS = edited(
    SELF,
    ("kh = Transpose<perm = [0, 2, 3, 1]>(k4)", "kh = Transpose<perm = [0, 2, 1, 3]>(k4)"),
    ("scores = MatMul(qh, kh)", ""), ("p = Softmax(scores)", ""),
    ("mixed = MatMul(p, vh)", "mixed = Attention(qh, kh, vh)"),
)  # fmt: skip


@pytest.mark.parametrize("text", [FUSED, FUSED_HEADS], ids=["heads split inside", "heads split before"])
def test_folds_through_an_attention_of_one_node(parse, difference, text):
    traced = parse(text, opset=23)
    before = traced.copy()
    assert fold_rotation_into_producer(traced).fired == 1
    assert not any(node.op == "HadamardRotate" for node in traced.graph.nodes)
    check(traced)
    assert difference(before, traced) <= 1e-10


NOT_FUSED = {
    "a block in two heads": ([("block = 12", "block = 24")], "blocks of 24 channels straddle heads of width 12"),
    "values that heads share": (
        [("kv_num_heads = 2", "kv_num_heads = 1"), ("k = Linear<rows = 24", "k = Linear<rows = 12"),
         ("v = Linear<rows = 24", "v = Linear<rows = 12")],
        "Attention shares its values between heads"),
    "values that are an output besides": (
        [("tokens, 24] y)", "tokens, 24] y, float[batch, 2, tokens, 12] values)"),
         ("mixed = Attention", "mixed, keys, values = Attention")], "Attention has keys and values of earlier calls"),
    "values that are read besides": (
        [("tokens, 24] y)", "tokens, 24] y, float[batch, 2, tokens, 12] z)"),
         ("mixed = Attention", "mixed, keys, values = Attention"), ("rotated =", "z = Neg(values) rotated =")],
        "Attention has keys and values of earlier calls"),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "reason"), NOT_FUSED.values(), ids=NOT_FUSED.keys())
def test_does_not_fold_through_an_attention_of_one_node(parse, edits, reason):
    result = fold_rotation_into_producer(parse(edited(FUSED, *edits), opset=23))
    assert result.fired == 0
    assert any(found.startswith(reason) for found in result.reasons()), result.reasons()


def test_heads_of_unknown_width_may_be_straddled(parse):
    traced = parse(FUSED, opset=23)
    traced.graph.tensors()["mixed"].shape = ["batch", "tokens", "width"]
    assert list(fold_rotation_into_producer(traced).reasons()) == ["the width of a head is not known"]


def test_values_of_earlier_calls_are_not_rotated(parse):
    """An attention with a past mixes the values with others, which no weight of this layer made."""
    past = "float[batch, 2, past, 12] pk, float[batch, 2, past, 12] pv"
    text = edited(
        FUSED, ("24] x)", f"24] x, {past})"),
        ("mixed = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)",
         "mixed, nk, nv = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v, , pk, pv)"),
    )  # fmt: skip
    result = fold_rotation_into_producer(parse(text, opset=23))
    assert result.fired == 0
    assert list(result.reasons()) == ["Attention has keys and values of earlier calls, or is asked for them"]


def test_channels_that_are_tokens_of_an_attention_are_not_its_channels(parse):
    text = edited(
        FUSED, ("tokens, 24] x", "24, 24] x"), ("tokens, 24] y", "24, 24] y"),
        ("mixed =", "vt = Transpose<perm = [0, 2, 1]>(v) turned ="), ("(q, k, v)", "(q, k, vt)"),
        ("rotated =", "mixed = Transpose<perm = [0, 2, 1]>(turned) rotated ="),
    )  # fmt: skip
    result = fold_rotation_into_producer(parse(text, opset=23))
    assert result.fired == 0
    assert list(result.reasons()) == ["Attention computes what it rotates, but not its channels alone"]


def test_two_rotations_behind_one_layer_both_fold(parse, difference):
    """The first must be gone as a reader before the second is looked at."""
    text = edited(SELF, (V, "w = Linear<rows = 24, cols = 24>(x) v = Rotate<block = 12, seed = 3>(w)"))
    traced = parse(text)
    before = traced.copy()
    assert fold_rotation_into_producer(traced).fired == 2
    assert not any(node.op == "HadamardRotate" for node in traced.graph.nodes)
    check(traced)
    assert difference(before, traced) <= 1e-10
