from functools import partial

import graph_texts
import pytest
from onnx.printer import to_text

from graphs.checks import check, check_preserved
from graphs.expressions import Expression
from graphs.passes import constant_fold, fuse_modulated_norm
from graphs.passes.patterns import numpy_type, redirect_readers

# adaLN: scale and shift are one row per sample.
MODULATED = f"""
adaptive (float[batch, tokens, 24] x, float[batch, 1, 24] scale, float[batch, 1, 24] shift)
    => (float[batch, tokens, 24] y)
<float one = {{1}}, float[24] ones = {{{", ".join(["1"] * 24)}}}, float[24] zeros = {{{", ".join(["0"] * 24)}}},
 float[24] weight = {{{", ".join(str(1 + place / 8) for place in range(24))}}},
 float[24] bias = {{{", ".join(str(place / 4 - 3) for place in range(24))}}}>
{{
    unit = LayerNormalization<epsilon = 0.01>(x, ones)
    factor = Add(scale, one) scaled = Mul(unit, factor) n = Add(scaled, shift)
    r = Rotate<block = 12, seed = 7>(n)
    y = Linear<rows = 24, cols = 24>(r)
}}
"""
UNIT, ADD, ROTATED = "unit = LayerNormalization<epsilon = 0.01>(x, ones)", "n = Add(scaled, shift)", "(n)"
MORE_OUTPUTS = ("24] y)", "24] y, float[batch, tokens, 24] {})")
# A norm alone.
ALONE = graph_texts.edited(
    MODULATED,
    ("factor = Add(scale, one) scaled = Mul(unit, factor) n = Add(scaled, shift)", ""),
    (ROTATED, "(unit)"),
    (", float[batch, 1, 24] scale, float[batch, 1, 24] shift", ""),
)
RMS = graph_texts.edited(
    ALONE,
    ("float one = {1}", "float epsilon = {0.01}, float two = {2}, int64[1] last = {-1}"),
    (UNIT, "square = Mul(x, x) mean = ReduceMean(square, last) total = Add(mean, epsilon) root = Sqrt(total) "
     "inverse = Reciprocal(root) unit = Mul(x, inverse)"),
)  # fmt: skip
SQUARE, TOTAL, UNIT_RMS = "square = Mul(x, x)", "total = Add(mean, epsilon)", "unit = Mul(x, inverse)"
MEAN, INVERSE = "mean = ReduceMean(square, last)", "inverse = Reciprocal(root) "


modulated, alone, rms = (partial(graph_texts.edited, text) for text in (MODULATED, ALONE, RMS))


CHECKPOINT = ("gamma", "beta")  # inputs of a graph that stand for weights


def with_checkpoint(text: str) -> str:
    return graph_texts.edited(text, ("24] x)", "24] x, float[24] gamma, float[24] beta)"))


FIRES = {  # text, op, epsilon
    "modulated": (modulated(), "LayerNormRotate", 0.01),
    "scale and shift on the left": (
        modulated(("Mul(unit, factor)", "Mul(factor, unit)"), (ADD, "n = Add(shift, scaled)")),
        "LayerNormRotate", 0.01),
    "a scale for every token": (
        modulated(("float[batch, 1, 24] scale", "float[batch, tokens, 24] scale")), "LayerNormRotate", 0.01),
    "tokens of fixed sizes": (
        modulated(("batch, tokens, 24] x", "2, 5, 24] x"), ("batch, 1, 24] scale", "2, 1, 24] scale"),
                  ("batch, 1, 24] shift", "1, 1, 24] shift"), ("batch, tokens, 24] y", "2, 5, 24] y")),
        "LayerNormRotate", 0.01),
    "the last axis counted from the first": (
        modulated((UNIT, UNIT.replace("<", "<axis = 2, "))), "LayerNormRotate", 0.01),
    "weights that do nothing": (modulated((UNIT, UNIT.replace("ones", "ones, zeros"))), "LayerNormRotate", 0.01),
    "modulated alike for all samples": (
        modulated(("Mul(unit, factor)", "Mul(unit, weight)"), (ADD, "n = Add(scaled, bias)")), "LayerNormRotate", 0.01),
    "tokens of sizes without a name": (
        modulated((UNIT, "length = Shape<start = 1, end = 2>(x) few = Slice(x, nought, length, axis) "
                   "k = Kept<rows = 24, cols = 24>(few) unit = LayerNormalization<epsilon = 0.01>(k, ones)"),
                  ("float one", "int64[1] nought = {0}, int64[1] axis = {1}, float one")), "LayerNormRotate", 0.01),
    "epsilon left to ONNX": (modulated((UNIT, "unit = LayerNormalization(x, ones)")), "LayerNormRotate", 1e-5),
    "of signs alone": (modulated(("block = 12", "block = 1")), "LayerNormRotate", 0.01),
    "equalized": (modulated(("seed = 7", "equalized = 3")), "LayerNormRotate", 0.01),
    "a scale without a shift": (modulated((ADD, ""), (ROTATED, "(scaled)")), "LayerNormRotate", 0.01),
    "no weights": (alone(), "LayerNormRotate", 0.01),
    "a weight": (alone((UNIT, UNIT.replace("ones", "weight"))), "LayerNormRotate", 0.01),
    "a weight and a bias": (alone((UNIT, UNIT.replace("ones", "weight, bias"))), "LayerNormRotate", 0.01),
    "a bias": (alone((UNIT, UNIT.replace("ones", "ones, bias"))), "LayerNormRotate", 0.01),
    "weights of the checkpoint": (
        with_checkpoint(alone((UNIT, UNIT.replace("ones", "gamma, beta")))), "LayerNormRotate", 0.01),
    "RMS": (rms(), "RMSNormRotate", 0.01),
    "RMS, the reciprocal on the left": (rms((UNIT_RMS, "unit = Mul(inverse, x)")), "RMSNormRotate", 0.01),
    "RMS, epsilon on the left": (rms((TOTAL, "total = Add(epsilon, mean)")), "RMSNormRotate", 0.01),
    "RMS by a power": (rms((SQUARE, "square = Pow(x, two)")), "RMSNormRotate", 0.01),
    "RMS over the last axis counted from the first": (rms(("last = {-1}", "last = {2}")), "RMSNormRotate", 0.01),
    "RMS by division": (
        rms((INVERSE, ""), (UNIT_RMS, "unit = Div(x, root)")), "RMSNormRotate", 0.01),
    "RMS by one over the root": (
        rms((INVERSE, "inverse = Div(unity, root) "), ("float two = {2}", "float unity = {1}")), "RMSNormRotate", 0.01),
    "RMS with a weight": (
        rms((UNIT_RMS, "one_rms = Mul(x, inverse) unit = Mul(one_rms, weight)")), "RMSNormRotate", 0.01),
    "RMS by division with a weight of the checkpoint": (
        with_checkpoint(rms(
            (INVERSE, ""), (UNIT_RMS, "one_rms = Div(x, root) scaled = Mul(gamma, one_rms) unit = Add(scaled, beta)"))),
        "RMSNormRotate", 0.01),
    "modulated RMS": (
        rms((UNIT_RMS, "one_rms = Mul(x, inverse) scaled = Mul(one_rms, weight) unit = Add(bias, scaled)")),
        "RMSNormRotate", 0.01),
    "an RMS norm of a layer norm": (
        rms((SQUARE, "ln = LayerNormalization(x, ones) square = Mul(ln, ln)"), (UNIT_RMS, "unit = Mul(ln, inverse)")),
        "RMSNormRotate", 0.01),
}  # fmt: skip


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def case(request, parse):
    text, op, epsilon = request.param
    traced = parse(text)
    for tensor in traced.graph.inputs:
        if tensor.name in CHECKPOINT:
            traced.tensors[tensor.name] = Expression(f"norm.{tensor.name}", (24,))
    return traced, op, epsilon


def rotations(traced):
    return [node for node in traced.graph.nodes if node.op.endswith("Rotate")]


def test_fuses_and_keeps_the_function(case, difference):
    traced, op, epsilon = case
    before = traced.copy()
    assert fuse_modulated_norm(traced).fired == 1
    (node,) = rotations(traced)
    assert (node.op, node.attrs["epsilon"]) == (op, pytest.approx(epsilon))
    assert traced.signs == before.signs
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


def test_fusing_again_does_nothing(case):
    traced, *_ = case
    fuse_modulated_norm(traced)
    before = traced.to_onnx()
    assert fuse_modulated_norm(traced).fired == 0
    assert traced.to_onnx() == before


def test_nothing_of_a_norm_is_left(parse):
    for text, steps in ((ALONE, []), (RMS, []), (MODULATED, ["Add"])):
        traced = parse(text)
        fuse_modulated_norm(traced)
        ops = [node.op for node in traced.graph.nodes]
        assert ops[: ops.index(rotations(traced)[0].op)] == steps  # what is left of adaLN is 1 + scale


@pytest.mark.parametrize(("text", "tokens"), [(MODULATED, "n"), (ALONE, "unit"), (RMS, "unit")])
def test_a_norm_whose_shape_is_read_is_not_computed_twice(parse, difference, text, tokens):
    edits = ("24] y)", "24] y, int64[3] size)"), ("r = Rotate", f"size = Shape({tokens}) r = Rotate")
    traced = parse(graph_texts.edited(text, *edits))
    before = traced.copy()
    assert fuse_modulated_norm(traced).fired == 1
    ops = [node.op for node in traced.graph.nodes]
    assert not {"LayerNormalization", "Sqrt"} & set(ops)
    assert "Shape" in ops
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11


@pytest.mark.parametrize(("text", "name"), [
    *((MODULATED, name) for name in ("unit", "scaled", "n")), (ALONE, "unit"),
    *((RMS, name) for name in ("square", "mean", "total", "root", "inverse", "unit")),
])  # fmt: skip
def test_a_node_of_another_domain_is_no_part_of_a_norm(parse, text, name):
    traced = parse(text)
    (node,) = traced.graph.tensors()[name].inputs
    node.domain = "other"
    assert fuse_modulated_norm(traced).fired == 0


IN_ANOTHER_FORM = "ReduceMean is behind what it rotates, but not in a form that a fused op has"
NORM_IN_ANOTHER_FORM = IN_ANOTHER_FORM.replace("ReduceMean", "LayerNormalization")
ELSEWHERE = "the normalized tokens are also read elsewhere, or rotated in another way"
NOT = {
    "the mean of a norm, modulated": (modulated((UNIT, UNIT.replace("unit", "other, unit"))), NORM_IN_ANOTHER_FORM),
    "a shift without a scale": (
        modulated((ADD, "n = Add(unit, shift)"), ("scaled = Mul(unit, factor)", "")), NORM_IN_ANOTHER_FORM),
    "a residual with the norm of another tensor in it": (
        modulated((ADD, "bent = Relu(scaled) n = Add(bent, shift)")), None),
    "over two axes": (
        modulated((UNIT, "square_ones = Expand(one, plane) unit = LayerNormalization<axis = -2>(x, square_ones)"),
                  ("tokens, 24] x", "5, 24] x"), ("tokens, 24] y", "5, 24] y"),
                  ("float one", "int64[2] plane = {5, 24}, float one")),
        "the norm before it is over the axes from -2, needed the last one"),
    "tokens that are read elsewhere": (
        modulated((MORE_OUTPUTS[0], MORE_OUTPUTS[1].format("z")), ("r = Rotate", "z = Relu(n) r = Rotate")), ELSEWHERE),
    "tokens that are an output": (modulated((MORE_OUTPUTS[0], MORE_OUTPUTS[1].format("n"))), ELSEWHERE),
    "a norm with weights that is modulated": (
        modulated((UNIT, UNIT.replace("ones", "weight, bias"))),
        "the norm before it has weights of its own and is modulated besides"),
    "a norm with a bias that is modulated": (
        modulated((UNIT, UNIT.replace("ones", "ones, bias"))),
        "the norm before it has weights of its own and is modulated besides"),
    "one scale for all channels of a sample": (
        modulated(("1, 24] scale", "1, 1] scale")),
        "the scale of the norm before it has shape (batch, 1, 1), needed one that broadcasts to (batch, tokens, 24)"),
    "one shift for all channels of a token": (
        modulated(("1, 24] shift", "tokens, 1] shift")),
        "the shift of the norm before it has shape (batch, tokens, 1)"),
    "a number": (
        modulated(("Mul(unit, factor)", "Mul(unit, one)")), "the scale of the norm before it has shape (), needed"),
    "a scale of more axes": (
        modulated(("float[batch, 1, 24] scale", "float[2, batch, 1, 24] scale"), ("=> (float[", "=> (float[2, ")),
        "the scale of the norm before it has shape (2, batch, 1, 24)"),
    "tokens of no known shape": (
        modulated((UNIT, "any = Reshape(x, s) " + UNIT.replace("(x", "(any")),
                  ("1, 24] shift)", "1, 24] shift, int64[n] s)")),
        "the scale of the norm before it has shape (batch, 1, 24), needed one that broadcasts to unknown"),
    "a scale for samples that share their tokens": (
        modulated(("float[batch, tokens, 24] x", "float[1, tokens, 24] x")),
        "the scale of the norm before it has shape (batch, 1, 24), needed one that broadcasts to (1, tokens, 24)"),
    "a scale for the tokens of an RMS norm of one": (
        rms(("float[batch, tokens, 24] x", "float[batch, 1, 24] x, float[batch, tokens, 24] w"),
            (UNIT_RMS, "one_rms = Mul(x, inverse) unit = Mul(one_rms, w)")),
        "the scale of the norm before it has shape (batch, tokens, 24), needed one that broadcasts to (batch, 1, 24)"),
    "weights of its own and a scale": (
        modulated((ADD, ""), (ROTATED, "(scaled)"), (UNIT, UNIT.replace("ones", "weight"))),
        "the norm before it has weights of its own and is scaled besides"),
    "a bias of its own and a scale": (
        modulated((ADD, ""), (ROTATED, "(scaled)"), (UNIT, UNIT.replace("ones", "ones, bias"))),
        "the norm before it has weights of its own and is scaled besides"),
    "what is modulated is added to itself": (modulated((ADD, "n = Add(scaled, scaled)")), NORM_IN_ANOTHER_FORM),
    "an activation between": (modulated((ROTATED, "(bent)"), ("r = Rotate", "bent = Relu(n) r = Rotate")), None),
    "no norm": (modulated((UNIT, "unit = Relu(x)")), None),
    "the mean over tokens": (rms(("last = {-1}", "last = {1}")), IN_ANOTHER_FORM),
    "the mean over tokens and channels": (rms(("int64[1] last = {-1}", "int64[2] last = {1, 2}")), IN_ANOTHER_FORM),
    "the mean over all": (rms((MEAN, MEAN.replace(", last", ""))), IN_ANOTHER_FORM),
    "a mean that loses its axis": (
        rms((MEAN, MEAN.replace("(", "<keepdims = 0>(")), ("[batch, tokens, 24] x", "[24, 24, 24] x"),
            ("[batch, tokens, 24] y", "[24, 24, 24] y")),
        IN_ANOTHER_FORM),
    "the square of another tensor": (
        rms(("24] x)", "24] x, float[batch, tokens, 24] w)"), (SQUARE, "square = Mul(w, w)")), IN_ANOTHER_FORM),
    "a product with another tensor": (
        rms(("24] x)", "24] x, float[batch, tokens, 24] w)"),
            (SQUARE, "product = Mul(x, w) square = Abs(product)")),
        IN_ANOTHER_FORM),
    "another tensor times it": (
        rms(("24] x)", "24] x, float[batch, tokens, 24] w)"), (SQUARE, "square = Mul(w, x)")), IN_ANOTHER_FORM),
    "a power that is fed": (rms(("24] x)", "24] x, float e)"), (SQUARE, "square = Pow(x, e)")), IN_ANOTHER_FORM),
    "an axis that is fed": (rms(("24] x)", "24] x, int64[1] axis)"), (MEAN, MEAN.replace("last", "axis"))),
                             IN_ANOTHER_FORM),
    "another tensor over the root": (
        rms(("24] x)", "24] x, float[batch, tokens, 24] w)"), (INVERSE, "inverse = Div(w, root) ")), IN_ANOTHER_FORM),
    "the fourth power": (rms((SQUARE, "square = Pow(x, four)"), ("float two = {2}", "float four = {4}")),
                         IN_ANOTHER_FORM),
    "an epsilon for every channel": (
        rms(("tokens, 24] x)", "tokens, 24] x, float[batch, 1, 24] e)"),
            (TOTAL, "total = Add(mean, ee)"), (SQUARE, "ee = Abs(e) square = Mul(x, x)")), IN_ANOTHER_FORM),
    "an epsilon that is computed": (
        rms(("24] x)", "24] x, float e)"), (TOTAL, "total = Add(mean, ee)"),
            (SQUARE, "ee = Abs(e) square = Mul(x, x)")), IN_ANOTHER_FORM),
    "an epsilon that is computed, on the left": (
        rms(("24] x)", "24] x, float e)"), (TOTAL, "total = Add(ee, mean)"),
            (SQUARE, "ee = Abs(e) square = Mul(x, x)")), IN_ANOTHER_FORM),
    "no epsilon": (rms((TOTAL, ""), ("Sqrt(total)", "Sqrt(mean)")), IN_ANOTHER_FORM),
    "times the root": (rms((INVERSE, ""), (UNIT_RMS, "unit = Mul(x, root)")), IN_ANOTHER_FORM),
    "by two over the root": (rms((INVERSE, "inverse = Div(two, root) ")), IN_ANOTHER_FORM),
    "a power for a root": (
        rms(("root = Sqrt(total) ", "root = Pow(total, half) "), ("float two = {2}", "float half = {0.5}")),
        IN_ANOTHER_FORM),
    "a power for the root and its reciprocal": (
        rms(("root = Sqrt(total) ", ""), (INVERSE, "inverse = Pow(total, half) "),
            ("float two = {2}", "float half = {-0.5}")), IN_ANOTHER_FORM),
    "the length of a token": (
        rms((UNIT_RMS, "length = ReduceL2(x, last) unit = Div(x, length)")),
        IN_ANOTHER_FORM.replace("ReduceMean", "ReduceL2")),
    "a mean without a root": (rms(("root = Sqrt(total) ", ""), (INVERSE, "inverse = Reciprocal(total) ")), None),
    "the square of a mean": (
        rms(("root = Sqrt(total) ", "root = Pow(total, two) ")), None),
    "a power of a mean that is fed": (
        rms(("24] x)", "24] x, float e)"), ("root = Sqrt(total) ", "root = Pow(total, e) ")), None),
    "a number that adds an axis": (
        rms(("float epsilon = {0.01}", "float[1, 1, 1, 1] epsilon = {0.01}"), ("float[batch, tokens, 24] y",
            "float[1, batch, tokens, 24] y")), "a number of the norm before it adds axes to its tokens"),
    "six steps behind a norm": (
        modulated(("(n)", "(far)"), ("r = Rotate", "n2 = Div(n, one) n3 = Div(n2, one) n4 = Div(n3, one) "
                   "far = Div(n4, one) r = Rotate")), NORM_IN_ANOTHER_FORM),
    "seven steps behind a norm": (
        modulated(("(n)", "(far)"), ("r = Rotate", "n2 = Div(n, one) n3 = Div(n2, one) n4 = Div(n3, one) "
                   "n5 = Div(n4, one) far = Div(n5, one) r = Rotate")), None),
    "the root over the tensor": (rms((INVERSE, ""), (UNIT_RMS, "unit = Div(root, x)")), IN_ANOTHER_FORM),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), NOT.values(), ids=NOT.keys())
def test_does_not_fire_and_says_why(parse, text, reason):
    traced = parse(text)
    check(traced)
    before = to_text(traced.to_onnx())
    result = fuse_modulated_norm(traced)
    assert result.fired == 0
    assert to_text(traced.to_onnx()) == before
    found = list(result.reasons())
    assert found == [] if reason is None else len(found) == 1 and found[0].startswith(reason), found


def without_the_one(traced, node):
    """scale in place of 1 + scale."""
    node.inputs[1] = next(tensor for tensor in traced.graph.inputs if tensor.name == "scale")


def scale_and_shift_swapped(traced, node):
    x, scale, shift, signs = node.inputs
    node.inputs = [x, shift, scale, signs]


def mean_kept(traced, node):
    node.op = "RMSNormRotate"


def epsilon_dropped(traced, node):
    node.attrs["epsilon"] = 0.0


def unrotated(traced, node):
    redirect_readers(node.outputs[0], node.inputs[0])


@pytest.mark.parametrize("wrong", [without_the_one, scale_and_shift_swapped, mean_kept, epsilon_dropped, unrotated])
def test_a_wrong_fusion_changes_the_function(parse, difference, wrong):
    before = parse(MODULATED)
    traced = before.copy()
    fuse_modulated_norm(traced)
    (node,) = rotations(traced)
    wrong(traced, node)
    traced.forget_unused()
    assert difference(before, traced) > 1e-6


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_what_a_norm_lacks_has_the_type_of_its_tokens(parse, element):
    ones = ", ".join(["1"] * 24)
    text = f"""norm ({element}[batch, tokens, 24] x) => ({element}[batch, tokens, 24] y) <float[24] many = {{{ones}}}>
    {{
        ones = Cast<to = {10 if element == "float16" else 16}>(many)
        n = LayerNormalization(x, ones)
        y = lrq.HadamardRotate<block = 8, base = 1, order = 0>(n, ones)
    }}"""
    traced = parse(text)
    constant_fold(traced)
    assert fuse_modulated_norm(traced).fired == 1
    check(traced)
    (node,) = [node for node in traced.graph.nodes if node.op == "LayerNormRotate"]
    assert {numpy_type(tensor).name for tensor in node.inputs} == {element}


def test_a_bias_that_is_named_but_left_out_is_none(parse):
    """Not run: ONNX Runtime's LayerNormalization reads it all the same and crashes."""
    traced = parse(alone((UNIT, UNIT.replace("ones", 'weight, ""'))))
    assert fuse_modulated_norm(traced).fired == 1
    (node,) = rotations(traced)
    assert (node.inputs[1].name, node.inputs[2].values.any()) == ("weight", False)
    check(traced)
