import graph_texts
import pytest

from graphs.checks import check, check_preserved
from graphs.ops.hadamard_rotate import rotation_attributes
from graphs.passes import cancel_rotations

# Only the first rotation is in shorthand, so no layer's weight is rotated for either.
BACK = """
back (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    there = Rotate<block = 8>(x)
    back = Rotate<block = 8>(there)
    y = Relu(back)
}
"""
SECOND = "back = Rotate<block = 8>(there)"
FIRES = {  # text, rotations left
    "a power of two": (BACK, 0),
    "signs come first": (
        graph_texts.edited(BACK, ("there = Rotate<block = 8>", "there = Rotate<block = 8, seed = 1>")), 1),
    "equalized first": (
        graph_texts.edited(BACK, ("there = Rotate<block = 8>", "there = Rotate<block = 8, equalized = 1>")), 1),
    "the first is an output": (
        graph_texts.edited(BACK, ("24] y)", "24] y, float[batch, tokens, 24] there)")), 1),
    "the first is read elsewhere": (
        graph_texts.edited(BACK, ("24] y)", "24] y, float[batch, tokens, 24] z)"), ("y =", "z = Neg(there) y =")), 1),
}  # fmt: skip


@pytest.mark.parametrize(("text", "left"), FIRES.values(), ids=FIRES.keys())
def test_cancels_and_keeps_the_function(parse, difference, text, left):
    traced = parse(text)
    before = traced.copy()
    assert cancel_rotations(traced).fired == 1
    assert [node.op for node in traced.graph.nodes].count("HadamardRotate") == left
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11
    assert cancel_rotations(traced).fired == 0


def symmetric_of_paley() -> int:
    """A block of Paley's second construction, whose prime is 1 modulo 4."""
    return next(block for block in range(12, 200, 4) if rotation_attributes(block)["order"] % 4 == 1)


def test_cancels_where_paleys_matrix_is_symmetric(parse, difference):
    block = symmetric_of_paley()
    text = BACK.replace("block = 8", f"block = {block}, width = {block}").replace("24]", f"{block}]")
    traced = parse(text)
    before = traced.copy()
    assert cancel_rotations(traced).fired == 1
    assert difference(before, traced) <= 1e-11


NOT = {
    "another block": (
        [(SECOND, "back = Rotate<block = 4>(there)")], "it follows another rotation, which it does not undo"),
    "signs in the second": (
        [(SECOND, "back = Rotate<block = 8, seed = 1>(there)")], "it follows another rotation, which it does not undo"),
    "a matrix that is not symmetric": (
        [(SECOND, "back = Rotate<block = 12>(there)"), ("there = Rotate<block = 8>", "there = Rotate<block = 12>")],
        "it follows a rotation of the same 12 channels, whose matrix is not symmetric"),
    "the output of the graph": (
        [("24] y)", "24] back)"), ("y = Relu(back)", "")], "the tensor that is rotated back is an output of the graph"),
    "something between": ([(SECOND, "bent = Relu(there) back = Rotate<block = 8>(bent)")], None),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "reason"), NOT.values(), ids=NOT.keys())
def test_does_not_fire_and_says_why(parse, edits, reason):
    traced = parse(graph_texts.edited(BACK, *edits))
    check(traced)
    before = traced.to_onnx()
    result = cancel_rotations(traced)
    assert result.fired == 0
    assert traced.to_onnx() == before
    assert list(result.reasons()) == ([] if reason is None else [reason])


@pytest.mark.parametrize("foreign", ["first", "second"])
def test_signs_that_are_fed_may_be_any_numbers(parse, foreign):
    """Only the table of signs says that they are ±1."""
    fed = "lrq.HadamardRotate<block = 8, base = 1, order = 0>({}, s)"
    edit = {"first": ("Rotate<block = 8>(x)", fed.format("x")), "second": (SECOND, f"back = {fed.format('there')}")}
    traced = parse(graph_texts.edited(BACK, edit[foreign], ("24] x)", "24] x, float[24] s)")))
    check(traced)
    result = cancel_rotations(traced)
    assert (result.fired, list(result.reasons())) == (0, ["signs are not in the table of signs"])


def test_cancelling_what_is_no_inverse_changes_the_function(parse, difference):
    before = parse(BACK)
    traced = parse(graph_texts.edited(BACK, (SECOND, "back = Identity(x)"), ("there = Rotate<block = 8>(x)", "")))
    assert difference(before, traced) <= 1e-11  # a right one
    other = parse(graph_texts.edited(BACK, (SECOND, "back = Rotate<block = 4>(there)")))
    assert difference(other, traced) > 1e-3
