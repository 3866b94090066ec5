from functools import partial

import graph_texts
import pytest
from onnx.printer import to_text

from graphs.checks import check, check_preserved
from graphs.expressions import Expression
from graphs.passes import PIPELINE, fold_smoothing
from graphs.passes.patterns import is_lrq

# adaLN before a layer whose input channels are equalized and not rotated.
MODULATED = f"""
adaptive (float[batch, tokens, 24] x, float[batch, 1, 24] scale, float[batch, 1, 24] shift)
    => (float[batch, tokens, 24] y)
<float one = {{1}}, float[24] ones = {{{", ".join(["1"] * 24)}}}, float epsilon = {{0.01}}, int64[1] last = {{-1}},
 float[24] weight = {{{", ".join(str(1 + place / 8) for place in range(24))}}},
 float[24] bias = {{{", ".join(str(place / 4 - 3) for place in range(24))}}}>
{{
    unit = LayerNormalization<epsilon = 0.01>(x, ones)
    factor = Add(scale, one) scaled = Mul(unit, factor) n = Add(scaled, shift)
    r = Rotate<block = 1, equalized = 3>(n)
    y = Linear<rows = 24, cols = 24>(r)
}}
"""
UNIT, MODULATION = (
    "unit = LayerNormalization<epsilon = 0.01>(x, ones)",
    "factor = Add(scale, one) scaled = Mul(unit, factor) n = Add(scaled, shift)",
)
AFFINE = graph_texts.edited(
    MODULATED,
    (UNIT, "n = LayerNormalization<epsilon = 0.01>(x, weight, bias)"),
    (MODULATION, ""),
    (", float[batch, 1, 24] scale, float[batch, 1, 24] shift", ""),
)
RMS = "square = Mul(x, x) mean = ReduceMean(square, last) e = Add(mean, epsilon) root = Sqrt(e) unit = Div(x, root)"
NORM = "LayerNormalization<epsilon = 0.01>(x, weight, bias)"


def and_output(name: str) -> tuple[str, str]:
    return "24] y)", f"24] y, float[batch, tokens, 24] {name})"


modulated, affine = (partial(graph_texts.edited, text) for text in (MODULATED, AFFINE))
FIRES = {  # text, products of one row each that are left to do
    "modulated": (modulated(), 2),
    "scale and shift on the left": (
        modulated(("Mul(unit, factor)", "Mul(factor, unit)"), ("Add(scaled, shift)", "Add(shift, scaled)")), 2),
    "a modulated RMS norm": (modulated((UNIT, RMS)), 2),
    "one tensor for scale and shift": (
        modulated(("factor = Add(scale, one)", ""), ("Mul(unit, factor)", "Mul(unit, scale)"),
                  ("Add(scaled, shift)", "Add(scaled, scale)"), (", float[batch, 1, 24] shift", "")), 2),
    "a scale that others read": (modulated(("y = Linear<rows = 24, cols = 24>(r)",
        "v = Linear<rows = 24, cols = 24>(r) w = Mul(v, factor) y = Add(w, shift)")), 2),
    "a norm that others read unmodulated": (modulated(and_output("z"), ("r = Rotate", "z = Neg(unit) r = Rotate")), 2),
    "several layers": (
        modulated(and_output("z"), ("y = Linear", "z = Linear<rows = 24, cols = 24>(r) y = Linear")), 2),
    "weight and bias": (affine(), 2),
    "a weight": (affine((NORM, NORM.replace(", bias", ""))), 1),
    "one tensor for weight and bias": (affine((NORM, NORM.replace("bias", "weight"))), 2),
    "weights of the checkpoint": (
        affine(("24] x)", "24] x, float[24] gamma, float[24] beta)"),
               (NORM, NORM.replace("weight, bias", "gamma, beta"))), 2),
    "the weight of an RMS norm": (
        affine((f"n = {NORM}", f"{RMS} n = Mul(unit, weight)")), 1),
}  # fmt: skip


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def case(request, parse):
    text, products = request.param
    traced = parse(text)
    for tensor in traced.graph.inputs:
        if tensor.name in ("gamma", "beta"):
            traced.tensors[tensor.name] = Expression(f"norm.{tensor.name}", (24,))
    return traced, products


def test_folds_and_keeps_the_function(case, difference):
    traced, products = case
    before = traced.copy()
    assert fold_smoothing(traced).fired == 1
    assert not any(is_lrq(node, "HadamardRotate") for node in traced.graph.nodes)
    readers = [node for node in traced.graph.nodes if any(tensor.name in traced.signs for tensor in node.inputs)]
    assert [node.op for node in readers] == ["Mul"] * products
    assert not any("tokens" in node.outputs[0].shape for node in readers)
    assert traced.signs == before.signs
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


def test_folding_again_does_nothing(case):
    traced, _ = case
    fold_smoothing(traced)
    before = traced.to_onnx()
    assert fold_smoothing(traced).fired == 0
    assert traced.to_onnx() == before


ELSEWHERE = "the modulated norm is also read elsewhere, without these factors"
NOT = {
    "the tokens are read elsewhere": (modulated(and_output("z"), ("r = Rotate", "z = Neg(n) r = Rotate")), ELSEWHERE),
    "the tokens are an output": (modulated(and_output("n")), ELSEWHERE),
    "the tokens without the shift are read elsewhere": (
        modulated(and_output("z"), ("r = Rotate", "z = Neg(scaled) r = Rotate")), ELSEWHERE),
    "the tokens without the shift are an output": (modulated(and_output("scaled")), ELSEWHERE),
    "the tokens of an affine norm are read elsewhere": (
        affine(and_output("z"), ("r = Rotate", "z = Neg(n) r = Rotate")), ELSEWHERE),
    "what it computes is an output": (modulated(and_output("r")), "what it computes is an output of the graph"),
    "a norm without weights": (
        modulated((MODULATION, ""), ("(n)", "(unit)"), (", float[batch, 1, 24] scale, float[batch, 1, 24] shift", "")),
        "the norm before it has no scale that could take them"),
    "a norm with a bias alone": (
        affine((NORM, NORM.replace("weight", "ones"))), "the norm before it has no scale that could take them"),
    "an RMS norm without a weight": (
        affine((f"n = {NORM}", RMS), ("(n)", "(unit)")), "the norm before it has no scale that could take them"),
    "a norm with weights that is modulated": (
        modulated((UNIT, UNIT.replace("ones", "weight"))),
        "the norm before it has weights of its own and is modulated besides"),
    "no norm": (modulated((UNIT, "unit = Relu(x)")), "no norm computes what it multiplies"),
    "something between": (
        modulated(("(n)", "(bent)"), ("r = Rotate", "bent = Relu(n) r = Rotate")),
        "no norm computes what it multiplies"),
    "an input of the graph": (
        modulated((UNIT, ""), (MODULATION, ""), ("(n)", "(x)"),
                  (", float[batch, 1, 24] scale, float[batch, 1, 24] shift", "")),
        "no norm computes what it multiplies"),
    "added to itself": (
        modulated(("Add(scaled, shift)", "Add(scaled, scaled)"), (", float[batch, 1, 24] shift", "")),
        "no norm computes what it multiplies"),
    "a number for a scale": (
        modulated(("Mul(unit, factor)", "Mul(unit, one)")), "the scale has shape (), needed one that broadcasts to"),
    "a number for a shift": (
        modulated(("Add(scaled, shift)", "Add(scaled, one)")), "the shift has shape (), needed one that broadcasts to"),
    "one scale for all channels": (
        modulated(("1, 24] scale", "1, 1] scale")),
        "the scale has shape (batch, 1, 1), needed one that broadcasts to (batch, tokens, 24)"),
    "one shift for all channels": (
        modulated(("1, 24] shift", "tokens, 1] shift")), "the shift has shape (batch, tokens, 1), needed"),
    "a weight of one number": (
        affine((NORM, NORM.replace("weight", "single")), ("float one", "float[1] single = {2}, float one")),
        "the scale has shape (1), needed one that broadcasts to (batch, tokens, 24)"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), NOT.values(), ids=NOT.keys())
def test_does_not_fire_and_says_why(parse, text, reason):
    traced = parse(text)
    check(traced)
    before = to_text(traced.to_onnx())
    result = fold_smoothing(traced)
    assert result.fired == 0
    assert to_text(traced.to_onnx()) == before
    (found,) = result.reasons()
    assert found.startswith(reason)


def test_what_mixes_channels_is_left_alone(parse):
    """No reason is given: this pass is about factors."""
    traced = parse(modulated(("block = 1", "block = 12")))
    result = fold_smoothing(traced)
    assert (result.fired, result.skipped) == (0, [])


def scale_alone(traced):
    """The shift added as it is."""
    (add,) = [node for node in traced.graph.nodes if node.op == "Add" and node.outputs[0].name == "n"]
    add.inputs = [each if each.name == "scaled" else each.inputs[0].inputs[0] for each in add.inputs]


def twice(traced):
    product = next(node for node in traced.graph.nodes if node.outputs[0].name == "r.scale")
    product.inputs = [product.inputs[1], product.inputs[1]]


def another_equalizer(traced):
    """The factors of the channels next to them."""
    (signs,) = traced.signs
    traced.graph.tensors()[signs].values = traced.graph.tensors()[signs].values[::-1].copy()


@pytest.mark.parametrize("wrong", [scale_alone, twice, another_equalizer])
def test_a_wrong_fold_changes_the_function(parse, difference, wrong):
    before = parse(MODULATED)
    traced = before.copy()
    fold_smoothing(traced)
    wrong(traced)
    traced.forget_unused()
    assert difference(before, traced) > 1e-3


def test_a_second_run_of_the_pipeline_keeps_the_factors_of_a_constant_weight(parse):
    """`graphs.online` sees by the product with signs that the channels are equalized."""
    traced = parse(affine())
    for step in (*PIPELINE, *PIPELINE):
        step(traced)
    assert any(tensor.name in traced.signs for node in traced.graph.nodes for tensor in node.inputs if node.op == "Mul")
