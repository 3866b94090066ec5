"""Activations in half precision: what goes over, what stays in float32 and why, and how little it moves the answers."""

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from graph_texts import ATTENTION
from rounded_run import run_rounded

from graphs.checks import check, check_preserved
from graphs.expressions import Expression
from graphs.integer_data import check_same_integers, integer_layers
from graphs.ops import attach_bodies
from graphs.passes import PIPELINE, TARGETS, half_precision, target_passes, to_bfloat16, to_float16
from graphs.passes.half_precision import BFLOAT16, FLOAT, FLOAT16, rounded
from graphs.passes.patterns import numpy_type
from lrq_export.verify.metrics import nmse

# One rounding moves a number by at most 2^-11 and 2^-8 of it, an NMSE of 8e-8 and 5e-6 on average; here are ten.
BOUND = {to_float16: 1e-6, to_bfloat16: 64e-6}

# A timestep's sinusoids modulate tokens, whose norm is written out.
TIMED = """
timed (float[batch] t, float[batch, tokens, 24] x, float[batch, tokens] mask) => (float[batch, tokens, 24] y)
<int64[1] last = {-1}, int64[1] middle = {1}, float[12] frequencies = {1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1,
0.05, 0.01}, float two = {2.0}, float epsilon = {0.000001}, float lowest = {-3.4e38}>
{
    column = Unsqueeze(t, last)
    angles = Mul(column, frequencies)
    sines = Sin(angles)
    cosines = Cos(angles)
    waves = Concat<axis = -1>(sines, cosines)
    shift = Kept<rows = 24, cols = 24>(waves)
    shifts = Unsqueeze(shift, middle)
    h = Kept<rows = 24, cols = 24>(x)
    square = Pow(h, two)
    mean = ReduceMean(square, last)
    total = Add(mean, epsilon)
    root = Sqrt(total)
    unit = Div(h, root)
    moved = Add(unit, shifts)
    hidden = Mul(mask, lowest)
    column_mask = Unsqueeze(hidden, last)
    r = Rotate<block = 24, seed = 3>(moved)
    masked = Add(r, column_mask)
    y = Gelu(masked)
}
"""
# Attention whose mask is of the lowest float32, computed from an input and a constant.
MASKED = """
masked (float[batch, tokens, 24] x, float[batch, tokens] mask) => (float[batch, tokens, 24] y)
<int64[1] middle = {1}, float one = {1.0}, float lowest = {-3.4028235e38},
float[5] causal = {0, 0, 0, -3.4e38, -3.4e38}>
{
    q = Kept<rows = 24, cols = 24>(x)
    k = Kept<rows = 24, cols = 24>(x)
    v = Kept<rows = 24, cols = 24>(x)
    columns = Transpose<perm = [0, 2, 1]>(k)
    scores = MatMul(q, columns)
    hidden = Sub(one, mask)
    low = Mul(hidden, lowest)
    row = Unsqueeze(low, middle)
    some = Add(scores, row)
    fewer = Add(some, causal)
    p = Softmax(fewer)
    y = MatMul(p, v)
}
"""
# Tokens of length one; what guards the divisor is zero in float16.
UNIT = """
unit (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
<int64[1] last = {-1}, float tiny = {1e-12}>
{
    h = Kept<rows = 24, cols = 24, bias = 0>(x)
    size = ReduceL2(h, last)
    guarded = Max(size, tiny)
    unit = Div(h, guarded)
    columns = Transpose<perm = [0, 2, 1]>(unit)
    scores = MatMul(unit, columns)
    y = MatMul(scores, h)
}
"""
CODED = """
coded (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    r = Rotate<block = 24, equalized = 1>(x)
    u = Linear<rows = 24, cols = 24>(r)
    v = Linear<rows = 24, cols = 24, bits = 8>(u)
    w = Linear<rows = 24, cols = 24, codebook = 1>(v)
    y = Relu(w)
}
"""
HALF = [(to_float16, FLOAT16), (to_bfloat16, BFLOAT16)]
half_types = pytest.mark.parametrize(("step", "element"), HALF, ids=["float16", "bfloat16"])


def types(traced):
    """The float type of every tensor by name."""
    held = {name: numpy_type(tensor) for name, tensor in traced.graph.tensors().items() if tensor.dtype is not None}
    return {name: element for name, element in held.items() if element in (FLOAT, FLOAT16, BFLOAT16)}


@pytest.fixture
def answer(weights):
    """What a graph without packed weights computes at large timesteps, with tokens of some size, rounded as it says."""

    def run(traced, size=1.0, mask=0.0):
        rng = np.random.default_rng(0)
        tokens = size * rng.standard_normal((2, 5, 24))
        fed = {"t": np.array([999.0, 731.5]), "x": tokens, "mask": np.full((2, 5), mask)} | weights(traced)
        fed = {name: array.astype(np.float32) for name, array in fed.items()}
        return run_rounded(attach_bodies(traced.to_onnx()), fed)["y"]

    return run


@half_types
def test_what_a_weight_has_reached_is_half_and_the_rest_stays(parse, step, element):
    traced = parse(TIMED)
    before = traced.copy()
    result = step(traced)
    check(traced)
    check_preserved(before, traced)
    held = types(traced)
    raw = {"t", "x", "mask", "column", "angles", "sines", "cosines", "waves", "frequencies", "hidden", "column_mask"}
    summed = {"square", "mean", "total", "root", "two", "epsilon"}
    assert {name for name in before.graph.tensors() if held.get(name) == FLOAT} == raw | summed | {"y", "lowest"}
    kept = {name for name in traced.tensors if held[name] == element}
    assert kept == set(traced.tensors)
    assert held["signs24_3"] == held["unit"] == held["masked"] == element
    assert result.fired == 11
    assert result.reasons() == {"what is added up stays in float32": 1}


@half_types
def test_no_cast_reads_what_is_known_ahead_of_time(parse, step, element):
    traced = parse(TIMED)
    step(traced)
    cast = {node.inputs[0].name for node in traced.graph.nodes if node.op == "Cast"}
    entering = {"waves.clipped", "x.clipped", "column_mask.clipped"}
    assert cast == entering | {"h", "unit.float32", f"y.{element.name}"}


@half_types
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_answers_move_by_little(parse, answer, size, step, element):
    traced = parse(TIMED)
    expected = answer(traced, size)
    step(traced)
    assert 0 < nmse(answer(traced, size), expected) < BOUND[step]


@half_types
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_where_a_mask_hides_all_there_is_an_answer(parse, answer, mask, size, step, element):
    """As in float32: the same to every token. Scores of some hundreds are added to the mask and leave it finite."""
    traced = parse(MASKED)
    expected = answer(traced, size, mask)
    step(traced)
    check(traced)
    held = types(traced)
    assert held["causal"] == held["p"] == element
    got = answer(traced, size, mask)
    assert np.isfinite(got).all()
    assert mask == 0 or size > 1 or nmse(got, expected) < BOUND[step]


def test_a_mask_of_infinity_would_be_seen(parse, answer, monkeypatch):
    monkeypatch.setattr(half_precision._Lowering, "_clipped", lambda self, tensor: tensor)
    traced = parse(MASKED)
    to_float16(traced)
    assert not np.isfinite(answer(traced)).all()


@half_types
@pytest.mark.parametrize("size", [0.0, 1e-5, 1.0])
def test_a_divisors_guard_is_no_zero(parse, answer, size, step, element):
    traced = parse(UNIT)
    expected = answer(traced, size)
    step(traced)
    check(traced)
    assert types(traced)["scores"] == types(traced)["unit"] == element
    got = answer(traced, size)
    assert np.isfinite(got).all()
    assert size < 1 or nmse(got, expected) < BOUND[step]


@pytest.mark.parametrize("op", ["Mul", "Div"])
@pytest.mark.parametrize(("number", "stays"), [("1e9", True), ("1e-6", True), ("0.125", False), ("0", False)])
def test_a_factor_that_float16_does_not_hold_is_a_near_miss(parse, op, number, stays):
    text = f"""
    factor (float[batch, 24] x) => (float[batch, 24] y)
    <float number = {{{number}}}>
    {{
        h = MatMul(x, w)
        y = {op}(h, number)
    }}
    """
    traced = with_weight(parse, text, (24, 24))
    result = to_float16(traced)
    check(traced)
    assert result.reasons() == ({"float16 does not hold its constant": 1} if stays else {})
    assert types(traced)["number"] == (FLOAT if stays else FLOAT16)


def test_bounds_past_the_largest_number_stay_in_float32_and_tiny_entries_of_a_table_do_not(parse):
    text = """
    bounds (float[batch, 2] x) => (float[batch, 2] y)
    <float most = {100000.0}, float least = {1e-12}, float[2] table = {1.0, 1e-17}>
    {
        h = MatMul(x, w)
        turned = Mul(h, table)
        guarded = Max(turned, least)
        y = Min(guarded, most)
    }
    """
    traced = with_weight(parse, text, (2, 2))
    assert to_float16(traced).reasons() == {"float16 does not hold its constant": 1}
    held = types(traced)
    assert (held["table"], held["least"], held["most"]) == (FLOAT16, FLOAT16, FLOAT)


def test_a_sum_that_is_an_output_and_joins_again_stays_one(parse):
    """As do those of weights alone, on and on."""
    text = """
    sums (float[batch, 24] x) => (float[batch, 1] size, float[batch, 24] unit, float[batch, 24] y)
    <int64[1] last = {-1}>
    {
        h = MatMul(x, w)
        size = ReduceL2(h, last)
        unit = Div(h, size)
        row = ReduceL2(w, last)
        scaled = Mul(w, row)
        y = MatMul(unit, scaled)
    }
    """
    traced = with_weight(parse, text, (24, 24))
    to_float16(traced)
    check(traced)
    held = types(traced)
    assert {held[name] for name in ("size", "unit", "y", "row", "scaled")} == {FLOAT}
    assert held["h"] == held["scaled.float16"] == FLOAT16
    once = traced.to_onnx()
    to_float16(traced)
    assert traced.to_onnx() == once


def test_sinusoids_in_half_would_be_seen(parse, answer, monkeypatch):
    """At timestep 731.5 float16 knows angles to a half."""
    monkeypatch.setattr(half_precision._Lowering, "_is_reached", lambda self, node: node.op != "Shape")
    monkeypatch.setattr(half_precision, "is_standard", lambda node, *ops: ops[0] != "Sin" and node.op in ops)
    traced = parse(TIMED)
    expected = answer(traced)
    to_float16(traced)
    assert types(traced)["sines"] == FLOAT16
    assert nmse(answer(traced), expected) > 1000 * BOUND[to_float16]


def test_squares_in_half_would_be_seen(parse, answer, monkeypatch):
    """They are past 65504."""
    monkeypatch.setattr(half_precision, "_adds_up", lambda node: False)
    traced = parse(TIMED)
    expected = answer(traced, 1000.0)
    to_float16(traced)
    assert types(traced)["square"] == FLOAT16
    assert not nmse(answer(traced, 1000.0), expected) < 1000 * BOUND[to_float16]


@half_types
@pytest.mark.parametrize("text", [TIMED, MASKED, UNIT, ATTENTION, CODED])
def test_lowering_again_does_nothing(parse, text, step, element):
    traced = parse(text)
    for rewrite in PIPELINE:
        rewrite(traced)
    step(traced)
    once = traced.to_onnx()
    for again in (traced, traced.copy()):
        assert step(again).fired == 0
        assert again.to_onnx() == once


@half_types
@pytest.mark.parametrize("text", [ATTENTION, CODED])
def test_integers_codes_and_scales_stay(parse, text, step, element):
    traced = parse(text)
    for rewrite in PIPELINE:
        rewrite(traced)
    before = traced.copy()
    assert step(traced).fired > 0
    check(traced)
    check_preserved(before, traced)
    check_same_integers(integer_layers(before), integer_layers(traced))
    was, now = before.graph.tensors(), traced.graph.tensors()
    for name in before.placeholders() & was.keys():  # no weight here is in floating point but scales and biases
        assert (now[name].dtype, now[name].shape) == (was[name].dtype, was[name].shape)
    products = [node for node in traced.graph.nodes if node.op.endswith("Linear")]
    assert products
    assert {numpy_type(node.inputs[0]) for node in products} == {element}
    assert [(node.op, node.attrs) for node in traced.graph.nodes if node.op not in ("Cast", "Clip")] == [
        (node.op, node.attrs) for node in before.graph.nodes
    ]


def test_a_weight_in_codes_whose_product_is_not_of_integers_is_cast_behind_its_decoding(parse):
    traced = parse(CODED)  # before make_linear
    to_float16(traced)
    check(traced)
    held = types(traced)
    assert (held["u_w"], held["u_wt"], held["u_open"]) == (FLOAT, FLOAT, FLOAT16)


def test_an_op_that_has_no_such_type_is_a_near_miss(parse):
    text = """
    patches (float[batch, 3, 8, 8] x) => (float[batch, 24, 4, 4] y)
    {
        p = Conv<kernel_shape = [2, 2], strides = [2, 2]>(x, w)
        y = Gelu(p)
    }
    """
    for step, reasons in ((to_float16, {}), (to_bfloat16, {"Conv of opset 21 takes no bfloat16": 1})):
        traced = with_weight(parse, text, (24, 3, 2, 2))
        result = step(traced)
        check(traced)
        assert result.reasons() == reasons
        assert result.fired == (0 if reasons else 2)


def with_weight(parse, text, shape):
    """The graph of a text that reads a kept weight `w`."""
    sizes = ", ".join(map(str, shape))
    name, rest = text.split("=>", 1)
    traced = parse(f"{name.rstrip()[:-1]}, float[{sizes}] w) =>{rest}")
    traced.tensors["w"] = Expression("w", shape)
    return traced


def test_a_weight_that_is_read_in_float32_too_is_rounded_by_a_cast(parse):
    text = """
    both (float[batch, 24] x) => (float[batch, 24] y)
    <int64[1] last = {-1}>
    {
        power = ReduceL2(w, last)
        h = MatMul(x, w)
        y = Div(h, power)
    }
    """
    traced = with_weight(parse, text, (24, 24))
    result = to_float16(traced)
    check(traced)
    assert "this weight is read in float32 too: a Cast rounds it" in result.reasons()
    assert types(traced)["w"] == FLOAT


def test_sinusoids_of_what_a_weight_has_reached_are_a_near_miss(parse):
    text = "waves (float[batch, 24] x) => (float[batch, 24] y) { h = MatMul(x, w)\n s = Sin(h)\n y = Mul(s, h) }"
    traced = with_weight(parse, text, (24, 24))
    result = to_float16(traced)
    check(traced)
    assert [skip.reason.split(",")[0] for skip in result.skipped] == ["a sinusoid stays in float32"]
    assert (types(traced)["h"], types(traced)["s"]) == (FLOAT16, FLOAT)


@half_types
def test_learned_frequencies_of_a_timestep_stay_in_float32(parse, answer, step, element):
    text = """
    learned (float[batch] t) => (float[batch, 24] y)
    <int64[1] last = {-1}, float turn = {6.2831853}>
    {
        column = Unsqueeze(t, last)
        turns = Mul(column, w)
        angles = Mul(turns, turn)
        sines = Sin(angles)
        cosines = Cos(angles)
        waves = Concat<axis = -1>(sines, cosines)
        y = Kept<rows = 24, cols = 24>(waves)
    }
    """
    traced = with_weight(parse, text, (12,))
    expected = answer(traced)
    result = step(traced)
    check(traced)
    assert result.reasons()["what only a sinusoid reads stays in float32"] == 1  # no weight reaches the next then
    assert types(traced)["w"] == FLOAT
    assert 0 < nmse(answer(traced), expected) < BOUND[step]


@half_types
def test_each_op_gets_what_its_schema_takes_and_says(parse, step, element):
    """Casts that the model has, an input left out, sizes past 65504, the largest of all, a loop and its state."""
    text = """
    odd (float[batch, 24] x) => (float[batch, 24] y, float[batch, 24] z)
    <float one = {1.0}, int64[1] last = {-1}, int64[2] flat = {-1, 131072}, int64 turns = {2}, bool go = {1}>
    {
        h = MatMul(x, w)
        wide = Cast<to = 1>(h)
        sure = Sin(wide)
        least = Clip(h, , one)
        most = ReduceMax(least, last)
        power = Mul(h, h)
        mean = ReduceMean(power, last)
        joined = Mul(least, mean)
        large = Reshape(h, flat)
        width = Shape(large)
        tall = Cast<to = 1>(width)
        scale = ReduceMax(tall)
        shifted = Add(joined, most)
        z = Loop(turns, go, shifted) <body = body (int64 turn, bool ahead, float[batch, 24] state)
            => (bool on, float[batch, 24] next) { on = Identity(ahead)  next = Add(state, h) }>
        sum = Add(h, sure)
        y = Div(sum, scale)
    }
    """
    traced = with_weight(parse, text, (24, 24))
    result = step(traced)
    check(traced)
    held = types(traced)
    halves = {"w", "h", "one", "least", "most", "joined", "large", "shifted", "sum"}
    assert {name for name in held if "." not in name and held[name] == element} == halves
    assert result.reasons() == {"what is added up stays in float32": 1, "its branches stay in float32": 1}
    assert [node.inputs[0].name for node in traced.graph.nodes if node.op == "Sin"] == ["wide"]


def test_what_reads_an_output_reads_it_in_half(parse):
    text = "two (float[batch, 24] x) => (float[batch, 24] h, float[batch, 24] y) { h = MatMul(x, w)\n y = Relu(h) }"
    traced = with_weight(parse, text, (24, 24))
    to_float16(traced)
    (relu,) = (node for node in traced.graph.nodes if node.op == "Relu")
    assert relu.inputs[0].name == "h.float16"


def test_branches_stay_in_float32(parse):
    traced = parse("plain (float[batch, 24] x) => (float[batch, 24] y) { y = Kept<rows = 24, cols = 24>(x) }")
    (output,) = traced.graph.outputs
    inner = gs.Variable("inner", FLOAT)
    branch = gs.Graph([gs.Node("Neg", "negative", {}, [output], [inner])], outputs=[inner], opset=traced.graph.opset)
    chosen = gs.Variable("z", FLOAT, ["batch", 24])
    flag, branches = gs.Constant("flag", np.array(True)), {"then_branch": branch, "else_branch": branch.copy()}
    traced.graph.nodes.append(gs.Node("If", "choice", branches, [flag], [chosen]))
    traced.graph.outputs.append(chosen)
    to_float16(traced)
    check(traced)


@half_types
def test_finite_numbers_stay_finite_and_only_zero_is_zero(step, element):
    values = np.array([0.0, -0.0, 1.0, -3.4e38, np.inf, 1e-45, 0.1], np.float32)
    held = rounded(values, element).astype(np.float64)
    assert held[:3].tolist() == [0, 0, 1]
    assert held[3] == -float(ml_dtypes.finfo(element).max) / 2
    assert held[4] == np.inf
    assert held[5] > 0
    assert held[6] == float(np.float32(0.1).astype(element))
    assert rounded(np.array(2.0, np.float32), element).shape == ()


def test_targets_of_tensorrt_begin_with_it():
    for target, steps in TARGETS.items():
        assert target_passes(target, "float32") == steps
        first = () if target == "onnxruntime" else (to_float16,)
        assert target_passes(target, "float16") == (*first, *steps)
