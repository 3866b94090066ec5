from functools import partial

import graph_texts
import pytest

from graphs.checks import check, check_preserved
from graphs.passes import share_rotation

THREE = """
siblings (float[batch, tokens, 24] x, float[batch, tokens, 24] z) => (float[batch, tokens, 24] y)
{
    rq = Rotate<block = 24>(x)
    q = Linear<rows = 24, cols = 24>(rq)
    rk = Rotate<block = 24>(x)
    k = Linear<rows = 24, cols = 24>(rk)
    rv = Rotate<block = 24>(x)
    v = Linear<rows = 24, cols = 24>(rv)
    qk = Mul(q, k)
    y = Add(qk, v)
}
"""
RK, RV = "rk = Rotate<block = 24>(x)", "rv = Rotate<block = 24>(x)"
OUTPUT, TWO_OUTPUTS = "=> (float[batch, tokens, 24] y)", "=> (float[batch, tokens, 24] y, float[batch, tokens, 24] {})"


edited = partial(graph_texts.edited, THREE)


FIRES = {
    "q, k and v": ([], 2, 1),
    "with equal signs": (
        [(RK, "rk = Rotate<block = 24, seed = 3>(x)"), (RV, "rv = Rotate<block = 24, seed = 3>(x)")], 1, 2),
    "equalized alike": (
        [(RK, "rk = Rotate<block = 24, equalized = 1>(x)"), (RV, "rv = Rotate<block = 24, equalized = 1>(x)")], 1, 2),
    "two pairs": ([(RK, "rk = Rotate<block = 12>(x)"), ("v = Linear", "rw = Rotate<block = 12>(x) v = Linear"),
                   ("(rv)", "(rw)"), ("qk = Mul(q, k)", "qv = Mul(q, rv) qk = Mul(qv, k)")], 2, 2),
    "a reader that reads a follower twice": ([("qk = Mul(q, k)", "kk = Mul(rk, rk) qk = Mul(q, kk)")], 2, 1),
    "the first one leaves the graph": ([(OUTPUT, TWO_OUTPUTS.format("rq"))], 2, 1),
    "the last one leaves the graph": ([(OUTPUT, TWO_OUTPUTS.format("rv"))], 2, 1),
    "a rotation of a rotation": (
        [(RV, "ra = Rotate<block = 12>(rq) rb = Rotate<block = 12>(rk) rv = Add(ra, rb)")], 2, 2),
}  # fmt: skip


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def case(request, parse):
    edits, *counts = request.param
    return parse(edited(*edits)), *counts


def test_equal_rotations_become_one_and_the_function_stays(case, difference):
    traced, fired, left = case
    before = traced.copy()
    assert share_rotation(traced).fired == fired
    assert [node.op for node in traced.graph.nodes].count("HadamardRotate") == left
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-12


def test_sharing_again_does_nothing(case):
    traced, *_ = case
    share_rotation(traced)
    before = traced.to_onnx()
    assert share_rotation(traced).fired == 0
    assert traced.to_onnx() == before


OTHER = "the same input is also rotated with another block or other signs"
REFUSALS = {
    "other input": ([(RK, "rk = Rotate<block = 24>(z)"), (RV, "w = Relu(x) rv = Rotate<block = 24>(w)")], []),
    "other block": ([(RK, "rk = Rotate<block = 12>(x)"), (RV, "rv = Rotate<block = 4>(x)")], [OTHER, OTHER]),
    "other divisors": (
        [(RK, "rk = Rotate<block = 24, equalized = 1>(x)"), (RV, "rv = Rotate<block = 24, equalized = 2>(x)")],
        [OTHER] * 2),
    "other signs": ([(RK, "rk = Rotate<block = 24, seed = 1>(x)"), (RV, "rv = Rotate<block = 24, seed = 2>(x)")],
                    [OTHER, OTHER]),
    "computed signs": ([("24] z", "24] z, float[24] s"),
        (RK, "rk = lrq.HadamardRotate<block = 12, base = 12, order = 11>(x, s)"),
        (RV, "rv = lrq.HadamardRotate<block = 12, base = 12, order = 11>(x, s)")],
        ["its signs are not a constant"] * 2),
    "both leave the graph": (
        [(OUTPUT, TWO_OUTPUTS.format("rq, float[batch, tokens, 24] rk")), (RV, "rv = Relu(x)")],
        ["the rotated tensor is an output of the graph"]),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "reasons"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_and_says_why(edits, reasons, parse):
    traced = parse(edited(*edits))
    before = traced.to_onnx()
    result = share_rotation(traced)
    assert result.fired == 0
    assert [skip.reason for skip in result.skipped] == reasons
    assert traced.to_onnx() == before


def test_sharing_another_rotation_is_caught(parse, difference):
    """The twin that must fail: readers of one rotation moved to another."""
    traced = parse(edited((RK, "rk = Rotate<block = 24, seed = 1>(x)")))
    before = traced.copy()
    first, second, _ = [node for node in traced.graph.nodes if node.op == "HadamardRotate"]
    (reader,) = second.outputs[0].outputs
    reader.inputs = [first.outputs[0] if tensor is second.outputs[0] else tensor for tensor in reader.inputs]
    assert difference(before, traced) > 1e-2


def test_reasons_are_counted(parse):
    traced = parse(edited((RK, "rk = Rotate<block = 12>(x)"), (RV, "rv = Rotate<block = 4>(x)")))
    assert share_rotation(traced).reasons() == {OTHER: 2}


def test_an_op_of_the_same_name_in_another_domain_is_no_rotation(parse):
    traced = parse(THREE)
    for node in traced.graph.nodes:
        node.domain = "other" if node.op == "HadamardRotate" else node.domain
    assert (share_rotation(traced).fired, share_rotation(traced).skipped) == (0, [])
