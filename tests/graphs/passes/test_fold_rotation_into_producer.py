from functools import partial

import graph_texts
import pytest

from graphs.checks import check, check_preserved
from graphs.expressions import RotateOutput
from graphs.passes import fold_rotation_into_producer

# Text embeddings, projected once and read by the cross-attentions of every block.
TEXT = """
captions (float[batch, text, 20] caption) => (float[batch, text, 24] y, float[batch, text, 24] z)
<int64[3] shape = {0, -1, 24}>
{
    hidden = Kept<rows = 24, cols = 20>(caption)
    active = Gelu(hidden)
    embedded = Kept<rows = 24, cols = 24>(active)
    shaped = Reshape(embedded, shape)
    rotated = Rotate<block = 12, seed = 7>(shaped)
    y = Linear<rows = 24, cols = 24>(rotated)
    z = Linear<rows = 24, cols = 24>(rotated)
}
"""
PROJECTION, ROTATION = "embedded = Kept<rows = 24, cols = 24>(active)", "Rotate<block = 12, seed = 7>"
SHAPED, Z = "shaped = Reshape(embedded, shape)", "z = Linear<rows = 24, cols = 24>(rotated)"


edited = partial(graph_texts.edited, TEXT)


FIRES = {
    "a projection in floating point": edited(),
    "without a bias": edited((PROJECTION, PROJECTION.replace("rows", "bias = 0, rows"))),
    "a quantized projection": edited((PROJECTION, PROJECTION.replace("Kept", "Linear"))),
    "a quantized projection of 8 bits without a bias": edited(
        (PROJECTION, PROJECTION.replace("Kept<", "Linear<bits = 8, bias = 0, "))
    ),
    "with its bias on the left": edited((PROJECTION, PROJECTION.replace("Kept<", "Linear<bias_first = 1, "))),
    "the full width, no signs": edited((ROTATION, "Rotate<block = 24>")),
    "an equalized input": edited((ROTATION, "Rotate<block = 12, seed = 7, equalized = 1>")),
    "equalizing alone": edited((ROTATION, "Rotate<block = 1, equalized = 1>")),
    "nothing between": edited((SHAPED, ""), ("(shaped)", "(embedded)")),
    "transposed tokens": edited((SHAPED, "turned = Transpose<perm = [1, 0, 2]>(embedded) "
                                 "shaped = Transpose<perm = [1, 0, 2]>(turned)")),
}  # fmt: skip


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def traced(request, parse):
    return parse(request.param)


def test_folds_and_keeps_the_function(traced, difference):
    before = traced.copy()
    assert fold_rotation_into_producer(traced).fired == 1
    assert not any(node.op == "HadamardRotate" for node in traced.graph.nodes)
    assert traced.signs == {}
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


def test_folding_again_does_nothing(traced):
    fold_rotation_into_producer(traced)
    before = traced.to_onnx()
    assert fold_rotation_into_producer(traced).fired == 0
    assert traced.to_onnx() == before


NOT = {
    "a residual between": (
        [(SHAPED, "plus = Add(embedded, active) shaped = Reshape(plus, shape)")],
        "Add computes what it rotates, no linear layer"),
    "a number that is added": (
        [(SHAPED, "plus = Add(embedded, half) shaped = Reshape(plus, shape)"),
         ("<int64[3]", "<float half = {0.5}, int64[3]")],
        "Add computes what it rotates, no linear layer"),
    "an activation between": (
        [(SHAPED, "bent = Gelu(embedded) shaped = Reshape(bent, shape)")],
        "Gelu computes what it rotates, no linear layer"),
    "an input of the graph": (
        [("20] caption)", "20] caption, float[batch, text, 24] x)"), ("(shaped)", "(x)")],
        "an input of the graph is what it rotates, no linear layer computes it"),
    "channels that move": (
        [("shape = {0, -1, 24}", "shape = {0, -1, 12}"), ("batch, text, 24] y", "batch, b, 24] y"),
         ("float[batch, text, 24] z", "float[batch, c, 24] z"),
         ("Rotate<block = 12, seed = 7>(shaped)", "Rotate<block = 12, width = 12>(shaped)"),
         ("y = Linear<rows = 24, cols = 24>", "y = Linear<rows = 24, cols = 12>"),
         ("z = Linear<rows = 24, cols = 24>", "z = Linear<rows = 24, cols = 12>")],
        "Reshape from ['batch', 'text', 24] to"),
    "a second reader of the projection": (
        [(Z, "z = Gelu(embedded)")],
        "the output of Add is also read elsewhere"),
    "a second reader of what is rotated": (
        [(Z, "z = Gelu(shaped)")], "the output of Reshape is also read elsewhere"),
    "a second reader right behind the projection": (
        [(SHAPED, ""), ("(shaped)", "(embedded)"), (Z, "z = Gelu(embedded)")],
        "the output of Add is also read elsewhere"),
    "the rotated tensor is an output": (
        [("text, 24] z", "text, 24] rotated"), (Z, "")],
        "the rotated tensor is an output of the graph"),
    "a weight that is not transposed": (
        [(PROJECTION, f"{PROJECTION} turned = Transpose<perm = [0, 1]>(embedded_weight) bare = MatMul(active, turned)"),
         ("(embedded, shape)", "(bare, shape)")],
        "MatMul computes what it rotates, neither a linear layer nor a mix of tokens"),
    "a weight that is computed": (
        [(PROJECTION, f"{PROJECTION} size = Abs(embedded_weight) turned = Transpose<perm = [1, 0]>(size) "
          "bare = MatMul(active, turned)"), ("(embedded, shape)", "(bare, shape)")],
        "MatMul computes what it rotates, neither a linear layer nor a mix of tokens"),
    "a weight that is read twice": (
        [(Z, "z = MatMul(y, embedded_wt)")], None),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "reason"), NOT.values(), ids=NOT.keys())
def test_does_not_fire_and_says_why(parse, edits, reason):
    traced = parse(edited(*edits))
    before = traced.to_onnx()
    result = fold_rotation_into_producer(traced)
    assert result.fired == 0
    assert traced.to_onnx() == before
    if reason is not None:
        assert any(found.startswith(reason) for found in result.reasons()), result.reasons()


def bias_missed(traced, before):
    traced.tensors["embedded_bias"] = before.tensors["embedded_bias"]


def transposed(traced, before):
    """Rᵀ in place of R, which for these blocks is another matrix."""
    step = RotateOutput(12, None)
    traced.tensors["embedded_weight"] = before.tensors["embedded_weight"].then(step)


def twice(traced, before):
    (step,) = traced.tensors["embedded_weight"].maps
    traced.tensors["embedded_weight"] = traced.tensors["embedded_weight"].then(step)


@pytest.mark.parametrize("wrong", [bias_missed, transposed, twice])
def test_a_wrong_fold_changes_the_function(parse, difference, wrong):
    before = parse(TEXT)
    traced = before.copy()
    fold_rotation_into_producer(traced)
    wrong(traced, before)
    check(traced)
    assert difference(before, traced) > 1e-3
