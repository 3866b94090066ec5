import random
from functools import partial

import graph_texts
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from graph_structure import disguise, structure
from onnx.printer import to_text

from graphs.checks import check, check_preserved
from graphs.passes import dead_code, fuse_epilogue, make_linear, merge_projections
from graphs.passes.fuse_epilogue import open_epilogues

# The end of a branch of adaLN-Zero: its gate is one row per sample.
GATED = """
branch (float[batch, tokens, 24] x, float[batch, 1, 24] gate) => (float[batch, tokens, 24] y)
<float half = {0.5}, float[24] row = {%s}>
{
    a = Relu(x)
    u = Linear<rows = 24, cols = 24>(a)
    gated = Mul(gate, u)
    sum = Add(gated, x)
    y = Neg(sum)
}
""" % ", ".join(str(place / 8 - 1) for place in range(24))  # noqa: UP031 - braces are ONNX text's
LINEAR, GATE, SUM = "u = Linear<rows = 24, cols = 24>(a)", "gated = Mul(gate, u)", "sum = Add(gated, x)"


def and_output(name: str) -> tuple[str, str]:
    return "24] y)", f"24] y, float[batch, tokens, 24] {name})"


edited = partial(graph_texts.edited, GATED)
PLAIN = edited((GATE, ""), (SUM, "sum = Add(u, x)"), (", float[batch, 1, 24] gate", ""))
FIRES = {  # text, the fused op, whether it has a gate
    "a gate": (edited(), "TwinLogLinearResidual", True),
    "the gate on the right": (edited((GATE, "gated = Mul(u, gate)")), "TwinLogLinearResidual", True),
    "the residual on the left": (edited((SUM, "sum = Add(x, gated)")), "TwinLogLinearResidual", True),
    "no gate": (PLAIN, "TwinLogLinearResidual", False),
    "no gate, the residual on the left": (PLAIN.replace("Add(u, x)", "Add(x, u)"), "TwinLogLinearResidual", False),
    "no bias": (edited((LINEAR, LINEAR.replace("rows", "bias = 0, rows"))), "TwinLogLinearResidual", True),
    "a codebook": (edited((LINEAR, LINEAR.replace("rows", "codebook = 1, rows"))), "CodebookLinearResidual", True),
    "8 bits": (edited((LINEAR, LINEAR.replace("rows", "bits = 8, rows"))), "Int8LinearResidual", True),
    "no gate, a codebook": (PLAIN.replace("<rows", "<codebook = 1, rows"), "CodebookLinearResidual", False),
    "no gate, 8 bits": (PLAIN.replace("<rows", "<bits = 8, rows"), "Int8LinearResidual", False),
    "a rotated input": (
        edited(("(a)", "(r)"), ("u =", "r = Rotate<block = 12>(a) u =")), "TwinLogLinearResidual", True),
    "the sum is the output of the graph": (
        edited((SUM, "y = Add(gated, x)"), ("y = Neg(sum)", "")), "TwinLogLinearResidual", True),
    "one gate for all samples": (edited((GATE, "gated = Mul(row, u)")), "TwinLogLinearResidual", True),
    "a gate for every token": (
        edited(("float[batch, 1, 24] gate", "float[batch, tokens, 24] gate")), "TwinLogLinearResidual", True),
    "a residual that is computed": (
        edited((SUM, "other = Neg(a) sum = Add(gated, other)")), "TwinLogLinearResidual", True),
    "what it reads is the residual": (edited((SUM, "sum = Add(gated, a)")), "TwinLogLinearResidual", True),
    "two linears added up": (
        edited((SUM, "v = Linear<rows = 24, cols = 24>(x) sum = Add(gated, v)")), "TwinLogLinearResidual", True),
}  # fmt: skip


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def case(request, parse):
    text, op, gated = request.param
    traced = parse(text)
    make_linear(traced)
    return traced, op, gated


def residuals(traced):
    return [node for node in traced.graph.nodes if node.op.endswith("Residual")]


def test_fuses_and_keeps_the_function(case, difference):
    traced, op, gated = case
    before = traced.copy()
    assert fuse_epilogue(traced).fired == 1
    (node,) = residuals(traced)
    assert node.op == op
    assert (node.inputs[-2].name == "u.no_gate") == (not gated)
    assert not {"Mul", "Add"} & {node.op for node in traced.graph.nodes}
    assert traced.linears == before.linears
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-12


@pytest.mark.parametrize("gated", [True, False])
def test_of_two_layers_that_are_added_up_one_takes_the_other_in(parse, gated):
    """The other is a residual then, and no near miss."""
    text = edited((SUM, "v = Linear<rows = 24, cols = 24>(x) sum = Add(gated, v)"))
    traced = parse(text if gated else text.replace("Mul(gate, u)", "Identity(u)"))
    dead_code(traced)
    make_linear(traced)
    result = fuse_epilogue(traced)
    assert (result.fired, result.skipped) == (1, [])


def test_of_two_gated_layers_the_right_one_takes_the_left_in_any_order_of_nodes(parse, difference):
    """The left one's gate is left."""
    text = edited((SUM, "v = Linear<rows = 24, cols = 24>(x) more = Mul(v, row) sum = Add(gated, more)"))
    traced = parse(text)
    make_linear(traced)
    before = traced.copy()
    orders = [traced.copy() for _ in range(4)]
    for seed, other in enumerate(orders):
        disguise(other.graph, random.Random(seed))
        result = fuse_epilogue(other)
        assert (result.fired, list(result.reasons())) == (1, ["the layer that it is added to takes it as its residual"])
        assert structure(other) == structure(orders[0])
    (node,) = residuals(orders[0])
    assert node.inputs[-2].name == "row"
    assert difference(before, orders[0]) <= 1e-12


def test_fusing_again_does_nothing(case):
    traced, *_ = case
    fuse_epilogue(traced)
    before = traced.to_onnx()
    assert fuse_epilogue(traced).fired == 0
    assert traced.to_onnx() == before


def computation(tensor):
    """All that a tensor is computed from, without the names of nodes and of inner tensors."""
    if isinstance(tensor, gs.Constant):
        return tensor.values.tolist()
    if not tensor.inputs:
        return tensor.name
    (node,) = tensor.inputs
    return node.domain or "", node.op, node.attrs, [computation(each) for each in node.inputs]


UNDONE = ["a gate", "no gate", "8 bits", "no gate, a codebook", "the sum is the output of the graph"]


@pytest.mark.parametrize("name", UNDONE)
def test_opening_undoes_it(parse, difference, name):
    traced = parse(FIRES[name][0])
    make_linear(traced)
    before = traced.copy()
    fuse_epilogue(traced)
    (was,), (now,) = before.graph.outputs, traced.graph.outputs
    assert computation(now) != computation(was)
    open_epilogues(traced)
    assert computation(now) == computation(was)
    assert len(traced.graph.nodes) == len(before.graph.nodes)
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) == 0


def test_opening_what_is_open_does_nothing(parse):
    traced = parse(GATED)
    make_linear(traced)
    before = traced.to_onnx()
    open_epilogues(traced)
    assert traced.to_onnx() == before


GATE_ALONE = "it is multiplied by a gate, and nothing is added to that alone"
READ_ELSEWHERE = "something is added to it that may be a residual, but it is also read elsewhere"
CONSTANT = "what is added to it is a constant or weight, no residual"
OWN_SHAPE = "its own shape is asked for to compute the gate or what is added"
NOT = {
    "a residual of the layer's own shape": (
        edited((SUM, "size = Shape(u) wide = Expand(row, size) other = Neg(wide) sum = Add(gated, other)")), OWN_SHAPE),
    "a residual of the gated shape": (
        edited((SUM, "size = Shape(gated) wide = Expand(row, size) sum = Add(gated, wide)")), OWN_SHAPE),
    "what is added has its shape by a branch": (
        edited((SUM, "size = Shape(u) wide = If(yes) <then_branch = t () => (float[batch, tokens, 24] tw) "
                "{ tw = Expand(row, size) }, else_branch = e () => (float[batch, tokens, 24] ew) { ew = Neg(x) }> "
                "sum = Add(gated, wide)"), ("float half = {0.5}", "float half = {0.5}, bool yes = {1}")), OWN_SHAPE),
    "a gate of the layer's own shape": (
        edited((GATE, "size = Shape(u) wide = Expand(gate, size) gated = Mul(wide, u)")), OWN_SHAPE),
    "a constant": (edited((SUM, "sum = Add(gated, row)")), CONSTANT),
    "a weight": (edited((SUM, "k = Kept<rows = 24, cols = 24>(x) sum = Add(gated, k_bias)"),
                        and_output("z"), ("y = Neg", "z = Neg(k) y = Neg")), CONSTANT),
    "one residual for all tokens": (
        edited((SUM, "sum = Add(gated, gate)")),
        "what is added to it has shape ['batch', 1, 24], needed ['batch', 'tokens', 24]"),
    "a residual of more tokens": (
        edited(("float[batch, tokens, 24] x, float[batch, 1, 24] gate",
                "float[batch, tokens, 24] r, float[batch, 1, 24] x, float[batch, 1, 24] gate"),
               (SUM, "sum = Add(gated, r)")),
        "what is added to it has shape ['batch', 'tokens', 24], needed ['batch', 1, 24]"),
    "a residual of sizes that are not known": (
        edited(("24] x,", "24] x, int64[3] sizes,"), (SUM, "same = Reshape(a, sizes) sum = Add(gated, same)")),
        "what is added to it has shape ['unk__"),
    "a residual of no known shape": (
        edited(("24] x,", "24] x, int64[n] s,"), (SUM, "any = Reshape(a, s) sum = Add(gated, any)")),
        "what is added to it has shape None, needed ['batch', 'tokens', 24]"),
    "a layer of no known shape": (
        edited(("24] x,", "24] x, int64[n] s,"), ("a = Relu(x)", "a = Reshape(x, s)")),
        "what is added to it has shape ['batch', 'tokens', 24], needed None"),
    "one gate for all channels": (
        edited(("1, 24] gate", "1, 1] gate")),
        "the gate has shape (batch, 1, 1), needed one that broadcasts to (batch, tokens, 24)"),
    "a number for a gate": (edited((GATE, "gated = Mul(half, u)")), "the gate has shape (), needed"),
    "a gate for samples that share their tokens": (
        edited(("float[batch, tokens, 24] x", "float[1, tokens, 24] x")),
        "the gate has shape (batch, 1, 24), needed one that broadcasts to (1, tokens, 24)"),
    "a gate that adds an axis": (
        edited(("float[batch, 1, 24] gate", "float[1, batch, 1, 24] gate"), ("=> (float[", "=> (float[1, ")),
        "the gate has shape (1, batch, 1, 24)"),
    "the linear is an output": (edited(and_output("u")), None),
    "the linear is an output, without a gate": (PLAIN.replace(*and_output("u")), READ_ELSEWHERE),
    "the linear is read elsewhere, without a gate": (
        PLAIN.replace("Add(u, x)", "Add(u, x) z = Neg(u)").replace(*and_output("z")), READ_ELSEWHERE),
    "the linear is read elsewhere, and another row is added to it": (
        PLAIN.replace("Add(u, x)", "Add(u, row) z = Neg(u)").replace(*and_output("z")), None),
    "the linear is read elsewhere, and a constant of its shape is added to it": (
        PLAIN.replace("[batch, tokens, 24]", "[1, 1, 24]").replace("float[24] row", "float[1, 1, 24] row")
        .replace("24] y)", "24] y, float[1, 1, 24] z)").replace("Add(u, x)", "Add(u, row) z = Neg(u)"), None),
    "the linear is read elsewhere, and one row for all tokens is added to it": (
        edited((GATE, "z = Neg(u)"), (SUM, "sum = Add(u, gate)"), and_output("z")), None),
    "the linear is read elsewhere, and multiplied by tokens": (
        PLAIN.replace("Add(u, x)", "Mul(u, x) z = Neg(u)").replace(*and_output("z")), None),
    "the gated linear is an output": (edited(and_output("gated")), GATE_ALONE),
    "the linear is read elsewhere": (edited((SUM, "b = Neg(u) sum = Add(gated, b)")), None),
    "the gated linear is read elsewhere": (edited((SUM, "b = Neg(gated) sum = Add(gated, b)")), GATE_ALONE),
    "added to itself": (PLAIN.replace("Add(u, x)", "Add(u, u)"), None),
    "times itself": (edited((GATE, "gated = Mul(u, u)")), None),
    "gated and added to itself": (edited((SUM, "sum = Add(gated, gated)")), GATE_ALONE),
    "gated twice": (edited((SUM, "again = Mul(gated, gate) sum = Add(again, x)")), GATE_ALONE),
    "subtracted": (edited((SUM, "sum = Sub(x, gated)")), GATE_ALONE),
    "an activation between": (edited((SUM, "bent = Relu(gated) sum = Add(bent, x)")), GATE_ALONE),
    "a number and no residual": (
        edited((GATE, "gated = Mul(half, u)"), (SUM, ""), ("Neg(sum)", "Neg(gated)")), None),
    "a gate and no residual": (edited((SUM, ""), ("Neg(sum)", "Neg(gated)")), GATE_ALONE),
    "activations in floating point": (edited((LINEAR, LINEAR.replace("rows", "act_bits = 16, rows"))), None),
    "kept in floating point": (edited((LINEAR, LINEAR.replace("Linear", "Kept"))), None),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), NOT.values(), ids=NOT.keys())
def test_does_not_fire_and_says_why(parse, text, reason):
    traced = parse(text)
    make_linear(traced)
    check(traced)
    before = to_text(traced.to_onnx())
    result = fuse_epilogue(traced)
    assert result.fired == 0
    assert to_text(traced.to_onnx()) == before
    found = list(result.reasons())
    assert found == [] if reason is None else len(found) == 1 and found[0].startswith(reason), found


def test_sizes_that_have_no_name_may_differ(parse):
    traced = parse(GATED)
    make_linear(traced)
    for tensor in traced.graph.tensors().values():
        if tensor.name in ("u", "x"):
            tensor.shape = ["batch", None, 24]
    result = fuse_epilogue(traced)
    assert list(result.reasons()) == ["what is added to it has shape ['batch', None, 24], needed ['batch', None, 24]"]


@pytest.mark.parametrize("asked", ["u", "gated"])
def test_what_is_asked_for_its_shape_alone_is_fused(parse, difference, asked):
    traced = parse(
        edited(
            ("24] y)", "24] y, int64[3] size)"), (SUM, f"other = Neg(x) sum = Add(gated, other) size = Shape({asked})")
        )
    )
    make_linear(traced)
    before = traced.copy()
    assert fuse_epilogue(traced).fired == 1
    assert not {"Mul", "Add"} & {node.op for node in traced.graph.nodes}
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-12


def test_a_residual_of_what_is_added_to_itself_many_times_takes_no_time(parse):
    """Forty sums of two lead up to x in 2^40 ways, all searched for the Shape."""
    sums = " ".join(f"s{n + 1} = Add(s{n}, s{n})" for n in range(40))
    traced = parse(
        edited(("24] y)", "24] y, int64[3] size)"), (SUM, f"s0 = Neg(x) {sums} sum = Add(gated, s40) size = Shape(u)"))
    )
    make_linear(traced)
    assert fuse_epilogue(traced).fired == 1


def test_merged_projections_have_no_epilogue(parse):
    traced = parse(graph_texts.ATTENTION)
    make_linear(traced)
    merge_projections(traced)
    assert fuse_epilogue(traced).fired == 0


def gate_missed(traced, node):
    """Ones, as where there is no gate."""
    *others, _, residual = node.inputs
    node.inputs = [*others, gs.Constant("ones", np.ones(24, np.float32)), residual]


def another_residual(traced, node):
    (relu,) = [each for each in traced.graph.nodes if each.op == "Relu"]
    *others, _ = node.inputs
    node.inputs = [*others, relu.outputs[0]]


def gated_residual(traced, node):
    """gate (residual + linear)."""
    product = gs.Variable("product", np.float32, node.outputs[0].shape)
    *others, gate, residual = node.inputs
    traced.graph.nodes.append(gs.Node("Mul", "product", {}, [gate, residual], [product]))
    node.inputs = [*others, gate, product]


@pytest.mark.parametrize("wrong", [gate_missed, another_residual, gated_residual])
def test_a_wrong_epilogue_changes_the_function(parse, difference, wrong):
    traced = parse(GATED)
    make_linear(traced)
    before = traced.copy()
    fuse_epilogue(traced)
    wrong(traced, *residuals(traced))
    traced.forget_unused()
    check(traced)
    assert difference(before, traced) > 1e-3
