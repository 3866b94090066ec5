from functools import partial

import graph_texts
import numpy as np
import pytest

from graphs.checks import check, check_preserved
from graphs.passes import make_linear

LINEAR = """
linear (float[batch, tokens, 24] x) => (float[batch, tokens, 36] y)
{
    u = Linear<rows = 36, cols = 24>(x)
    y = Relu(u)
}
"""
U = "u = Linear<rows = 36, cols = 24>(x)"
AFTER_OPEN = "u = Linear<rows = 36, cols = 24, bias = 0>(x) "


edited = partial(graph_texts.edited, LINEAR)


FIRES = {
    "bias": ([], ["TwinLogLinear", "Relu"]),
    "bias on the left": ([("<rows", "<bias_first = 1, rows")], ["TwinLogLinear", "Relu"]),
    "no bias": ([("<rows", "<bias = 0, rows")], ["TwinLogLinear", "Relu"]),
    "8 bits": ([("<rows", "<bits = 8, rows")], ["Int8Linear", "Relu"]),
    "codebook": ([("<rows", "<codebook = 1, rows")], ["CodebookLinear", "Relu"]),
    "2-bit codebook": ([("<rows", "<codebook = 1, bits = 2, bias = 0, rows")], ["CodebookLinear", "Relu"]),
    "2 bits, 6-bit activations": ([("<rows", "<bits = 2, act_bits = 6, rows")], ["TwinLogLinear", "Relu"]),
    "output of the graph": ([("36] y)", "36] u)"), ("y = Relu(u)", "")], ["TwinLogLinear"]),
    "open product leaves the graph": (
        [("36] y)", "36] y, float[batch, tokens, 36] u_open)")], ["TwinLogLinear", "Add", "Relu"]),
    "open product is asked for its shape": (
        [("36] y)", "36] y, int64[3] size)"), ("y = Relu(u)", "y = Relu(u) size = Shape(u_open)")],
        ["TwinLogLinear", "Relu", "Shape"]),
    "a residual is not a bias": ([(U, AFTER_OPEN), ("Relu(u)", "Add(u, u)")], ["TwinLogLinear", "Add"]),
    "a number is not a bias": (
        [("24] x)", "24] x, float b)"), (U, AFTER_OPEN), ("Relu(u)", "Add(u, b)")], ["TwinLogLinear", "Add"]),
    "a row of one is not a bias": (
        [("24] x)", "24] x, float[1] b)"), (U, AFTER_OPEN), ("Relu(u)", "Add(u, b)")], ["TwinLogLinear", "Add"]),
    "a computed row is not a bias": (
        [("24] x)", "24] x, float[36] b)"), (U, AFTER_OPEN + "a = Abs(b)"), ("Relu(u)", "Add(u, a)")],
        ["Abs", "TwinLogLinear", "Add"]),
    "a chain": ([("Relu(u)", "Linear<rows = 36, cols = 36>(u)")], ["TwinLogLinear", "TwinLogLinear"]),
}  # fmt: skip


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def case(request, parse):
    edits, ops = request.param
    return parse(edited(*edits)), ops


def test_open_linears_become_one_node_and_the_function_stays(case, difference):
    traced, ops = case
    before = traced.copy()
    assert make_linear(traced).fired == sum(op.endswith("Linear") for op in ops)
    assert [node.op for node in traced.graph.nodes] == ops
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-12


def test_making_again_does_nothing(case):
    traced, _ = case
    make_linear(traced)
    before = traced.to_onnx()
    assert make_linear(traced).fired == 0
    assert traced.to_onnx() == before


@pytest.mark.parametrize(("codebook", "levels"), [(0, "u.exponents"), (1, "u.table")])
def test_the_node_is_named_after_its_layer_and_reads_its_weight(parse, codebook, levels):
    traced = parse(edited(("<rows", f"<bias = 0, act_bits = 6, codebook = {codebook}, rows")))
    make_linear(traced)
    node = traced.graph.nodes[0]
    assert node.name == "u"
    assert [tensor.name for tensor in node.inputs] == ["x", "u.codes", levels, "u.scale", "u.no_bias"]
    assert not node.inputs[-1].values.any()
    assert {key: node.attrs[key] for key in ("act_bits", "rotation", "block")} == {
        "act_bits": 6, "rotation": "none", "block": 0,
    }  # fmt: skip


READ_BY = "its weight is read by {}, needed one MatMul of tokens by its transpose"
REFUSALS = {
    "activations in floating point": ([("<rows", "<act_bits = 16, rows")], "its activations stay in floating point"),
    "weight multiplied twice": (
        [("y = Relu(u)", "z = MatMul(x, u_wt) y = Mul(u, z)")], READ_BY.format("MatMul, MatMul")),
    "weight not transposed": (
        [("36] y)", "24] y)"), (U, "u = Linear<rows = 24, cols = 24>(x) z = MatMul(u, u_w)"), ("Relu(u)", "Relu(z)")],
        READ_BY.format("MatMul, MatMul")),
    "weight transposed but not multiplied": (
        [("24] x)", "24] x) "), ("36] y)", "36] y, float[24, 36] t)"), ("y = Relu(u)", "y = Relu(u) t = Neg(u_wt)")],
        READ_BY.format("MatMul, Neg")),
    "weight handed on untransposed": (
        [("36] y)", "24] y)"), (U, "u = Linear<rows = 24, cols = 24>(x) w = Transpose<perm = [0, 1]>(u_w)"),
         ("Relu(u)", "MatMul(x, w)")],
        READ_BY.format("MatMul")),
    "weight transposed but added": (
        [("batch, tokens, 36] y", "24, 36] y"), ("24] x)", "24] x, float[24, 36] z)"), (U, AFTER_OPEN),
         ("Relu(u)", "Add(z, u_wt)")],
        READ_BY.format("Add")),
    "product from the right": (
        [("24] x)", "24] x, float[36, 5] z)"), ("float[batch, tokens, 36] y", "float[24, 5] y"), (U, AFTER_OPEN),
         ("Relu(u)", "MatMul(u_wt, z)")],
        READ_BY.format("MatMul")),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_and_says_why(edits, reason, parse):
    traced = parse(edited(*edits))
    before = traced.to_onnx()
    result = make_linear(traced)
    assert result.fired == 0
    assert [reason in skip.reason for skip in result.skipped] == [True]
    assert traced.to_onnx() == before


BIAS_APART = "its bias stays apart: the product before it is also read elsewhere"
ADDED = {  # to a product that is an output of the graph as well: edits, what the near miss says
    "its bias": ([], [BIAS_APART]),
    "a number": ([("float[36] b", "float b")], []),
    "a computed row": ([("Add(u, b)", "Add(u, bent)"), ("z = ", "bent = Abs(b) z = ")], []),
    "itself": ([("Add(u, b)", "Add(u, u)")], []),
    "nothing": ([("Add(u, b)", "Mul(u, b)")], []),
}


@pytest.mark.parametrize(("edits", "reasons"), ADDED.values(), ids=ADDED.keys())
def test_a_bias_behind_a_product_that_is_read_elsewhere_is_a_near_miss(parse, difference, edits, reasons):
    shared = edited(
        ("24] x)", "24] x, float[36] b)"), ("36] y)", "36] y, float[batch, tokens, 36] u)"), (U, AFTER_OPEN),
        ("y = Relu(u)", "z = Add(u, b) y = Relu(z)"),
    )  # fmt: skip
    traced = parse(graph_texts.edited(shared, *edits))
    before = traced.copy()
    result = make_linear(traced)
    assert (result.fired, list(result.reasons())) == (1, reasons)
    check(traced)
    assert difference(before, traced) <= 1e-12


def test_a_row_that_is_added_behind_the_bias_is_no_bias(parse):
    traced = parse(edited(("24] x)", "24] x, float[36] b)"), ("Relu(u)", "Add(u, b)")))
    result = make_linear(traced)
    assert (result.fired, result.skipped) == (1, [])


def test_a_lost_bias_is_caught(parse, difference):
    """The twin that must fail: the new node reads zeros where the layer has a bias."""
    traced = parse(LINEAR)
    before = traced.copy()
    make_linear(traced)
    bias = traced.graph.nodes[0].inputs[-1]
    assert difference(before, traced, lambda fed: fed.update({bias.name: np.zeros(36, np.float32)})) > 1e-3


NESTED = (
    "ty = If(yes) <then_branch = i () => (float[batch, 24] iy) { iy = Add(u, b) }, "
    "else_branch = j () => (float[batch, 24] jy) { jy = Neg(u) }>"
)
IN_A_BRANCH = {  # nodes of the branch, layers that close, the bias of that layer, the near miss
    "a sum": ("ty = Add(u, b)", 1, "u.no_bias", BIAS_APART),
    "a sum in a branch of it": (NESTED, 1, "u.no_bias", BIAS_APART),
    "a product": (
        "ty = MatMul(x, u_wt)", 0, None,
        READ_BY.format("nothing in the graph itself, and by 1 in branches")),
}  # fmt: skip


@pytest.mark.parametrize(("inner", "fired", "bias", "reason"), IN_A_BRANCH.values(), ids=IN_A_BRANCH.keys())
def test_what_is_in_a_branch_stays_there(parse, difference, inner, fired, bias, reason):
    """Its nodes are not the graph's to replace, and may not run."""
    traced = parse(f"""
    branch (float[batch, 24] x, float[24] b) => (float[batch, 24] y) <bool yes = {{1}}>
    {{
        u = Linear<rows = 24, cols = 24, bias = 0>(x)
        y = If(yes) <then_branch = t () => (float[batch, 24] ty) {{ {inner} }},
                     else_branch = e () => (float[batch, 24] ey) {{ ey = Neg(x) }}>
    }}""")
    before = traced.copy()
    result = make_linear(traced)
    assert (result.fired, list(result.reasons())) == (fired, [reason])
    assert [node.inputs[-1].name for node in traced.graph.nodes if node.op == "TwinLogLinear"] == [bias] * fired
    (was,), (now,) = ([node for node in each.graph.nodes if node.op == "If"] for each in (before, traced))
    for one, other in zip(was.subgraphs(recursive=True), now.subgraphs(recursive=True), strict=True):
        assert [node.op for node in one.nodes] == [node.op for node in other.nodes]
    check(traced)
    assert difference(before, traced) <= 1e-12


@pytest.mark.parametrize(("other", "fired"), [
    ("y = Linear<rows = 12, cols = 36>(u_wt)", 1), ("y = Kept<rows = 12, cols = 36>(u_wt)", 0),
    ("m = Abs(w) t = Transpose<perm = [1, 0]>(m) s = MatMul(u_wt, t) y = Add(s, b)", 0),
], ids=["quantized", "in floating point", "computed"])  # fmt: skip
def test_a_weight_that_another_layer_multiplies_is_no_layer(parse, difference, other, fired):
    """One MatMul reads its transpose, on the left of another weight: only that one's layer is there."""
    inputs = ("24] x)", "24] x, float[12, 36] w, float[12] b)")
    traced = parse(edited(("batch, tokens, 36] y", "24, 12] y"), inputs, ("y = Relu(u)", other)))
    before = traced.copy()
    result = make_linear(traced)
    assert result.fired == fired
    assert [skip.reason for skip in result.skipped] == [READ_BY.format("MatMul")]
    check(traced)
    assert difference(before, traced) <= 1e-12
