import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.equalizer import divisors, encode
from graphs.expressions import MAPS, Expression, RotateInput, RotateOutput, StackRows
from graphs.ops.hadamard import hadamard_matrix
from lrq_export.errors import InputError
from lrq_export.evaluate import evaluate
from lrq_export.quant.rotation import hadamard_signs

BLOCKS = {24: (1, 2, 4, 8, 12, 24), 20: (2, 4, 20), 36: (4, 12, 36)}
SEEDS = st.sampled_from([None, 0, 7])


def read(name):
    rows, cols = {"a": (24, 20), "b": (36, 20), "c": (24, 36), "d": (24, 24)}.get(name.removesuffix(".bias"))
    shape = (rows,) if name.endswith(".bias") else (rows, cols)
    return torch.randn(shape, generator=torch.Generator().manual_seed(ord(name[0])), dtype=torch.float64)


EQUALIZERS = {width: encode(np.exp2(np.linspace(-2, 3, width))) for width in BLOCKS}


def dense(width, block, seed, equalizer=None):
    """R = diag(signs / d)·H per block, as a matrix."""
    signs = np.ones(width) if seed is None else hadamard_signs(width, seed).numpy()
    factors = signs.astype(np.float64) / (1 if equalizer is None else divisors(equalizer))
    return np.diag(factors) @ np.kron(np.eye(width // block), hadamard_matrix(block))


@st.composite
def weights(draw):
    name, shape = draw(st.sampled_from([("a", (24, 20)), ("b", (36, 20)), ("c", (24, 36)), ("d", (24, 24))]))
    expression = Expression(f"{name}", shape)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from([RotateInput, RotateOutput]))
        width = shape[0] if kind is RotateOutput else shape[1]
        block, equalizer = draw(st.sampled_from(BLOCKS[width])), draw(st.sampled_from([None, EQUALIZERS[width]]))
        expression = expression.then(kind(block, draw(SEEDS), equalizer))
    return expression


def by_matrices(expression):
    value = read(expression.source).numpy()
    for step in expression.maps:
        if isinstance(step, RotateInput):
            value = value @ np.linalg.inv(dense(value.shape[1], step.block, step.signs_seed, step.equalizer)).T
        elif isinstance(step, RotateOutput):
            value = dense(value.shape[0], step.block, step.signs_seed, step.equalizer).T @ value
        else:
            value = np.concatenate([value, *map(by_matrices, step.others)])
    return value


@given(weights())
@settings(max_examples=40, deadline=None)
def test_evaluation_equals_dense_matrices(expression):
    got, expected = evaluate(expression, read, torch.float64).numpy(), by_matrices(expression)
    assert got.shape == expression.shape
    assert np.abs(got - expected).max() <= 1e-12 * max(1, np.abs(expected).max())


@given(weights())
@settings(max_examples=40, deadline=None)
def test_json_round_trip(expression):
    stacked = expression.then(StackRows((Expression("d", (5, expression.shape[1])), expression)))
    for each in (expression, stacked):
        assert Expression.from_json(json.loads(json.dumps(each.to_json()))) == each


def test_equal_expressions_are_one_key():
    one, other = (Expression("a", (24, 20)).then(RotateInput(20)) for _ in range(2))
    assert {one: "weight"}[other] == "weight"


@pytest.mark.parametrize("block", [2, 12, 24])
def test_rotating_both_sides_keeps_the_product(block):
    """(x R)(W R⁻ᵀ)ᵀ = x Wᵀ."""
    weight = evaluate(Expression("c", (24, 36)).then(RotateInput(36, 7)), read, torch.float64).numpy()
    x = np.random.default_rng(0).standard_normal((5, 36))
    assert np.allclose(x @ dense(36, 36, 7) @ weight.T, x @ read("c").numpy().T, atol=1e-12)
    rotated = evaluate(Expression("c", (24, 36)).then(RotateOutput(block, 7)), read, torch.float64).numpy()
    assert np.allclose(x @ rotated.T, x @ read("c").numpy().T @ dense(24, block, 7), atol=1e-12)


def test_a_bias_rotates_as_the_output_of_its_layer_does():
    """x W'ᵀ + b' = (x Wᵀ + b) R."""
    step = RotateOutput(12, 7)
    weight = evaluate(Expression("a", (24, 20)).then(step), read, torch.float64).numpy()
    bias = evaluate(Expression("a.bias", (24,)).then(step), read, torch.float64).numpy()
    x = np.random.default_rng(0).standard_normal((5, 20))
    plain = x @ read("a").numpy().T + read("a.bias").numpy()
    assert np.allclose(x @ weight.T + bias, plain @ dense(24, 12, 7), atol=1e-12)


def test_stacked_rows_keep_their_own_maps():
    first, second = Expression("a", (24, 20)).then(RotateOutput(12)), Expression("b", (36, 20)).then(RotateInput(20))
    stacked = first.then(StackRows((second,)))
    assert stacked.shape == (60, 20)
    assert stacked.sources() == ["a", "b"]
    got = evaluate(stacked, read, torch.float64).numpy()
    assert np.abs(got - np.concatenate([by_matrices(first), by_matrices(second)])).max() <= 1e-12


def test_maps_after_a_stack_apply_to_all_rows():
    stacked = Expression("a", (24, 20)).then(StackRows((Expression("b", (36, 20)),))).then(RotateInput(20, 7))
    assert np.abs(evaluate(stacked, read, torch.float64).numpy() - by_matrices(stacked)).max() <= 1e-12


def test_a_missing_bias_is_zeros_through_every_map():
    bias = Expression(None, (24,)).then(RotateOutput(12, 7)).then(StackRows((Expression("b.bias", (36,)),)))
    assert bias.sources() == ["b.bias"]
    got = evaluate(bias, read)
    assert not got[:24].any()
    assert torch.equal(got[24:], read("b.bias").float())


def test_float32_is_the_default_and_close_to_float64():
    expression = Expression("a", (24, 20)).then(RotateInput(20, 7)).then(RotateOutput(24))
    single, double = evaluate(expression, read), evaluate(expression, read, torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert (single - double).abs().max() <= 1e-5


REFUSALS = {
    "input block": (RotateInput(3), "RotateInput: block 3 does not divide 20 channels"),
    "output block": (RotateOutput(16), "RotateOutput: block 16 does not divide 24 channels"),
    "zero": (RotateOutput(0), "RotateOutput: block 0 does not divide 24 channels"),
    "negative": (RotateInput(-4), "RotateInput: block -4 does not divide 20 channels"),
    "divisors": (RotateInput(20, None, EQUALIZERS[24]), "RotateInput: 24 divisors, needed one for each of 20 channels"),
    "columns": (StackRows((Expression("c", (24, 36)),)), "StackRows: c has columns (36,), needed (20,)"),
    "rank": (StackRows((Expression("a.bias", (24,)),)), "StackRows: a.bias has columns (), needed (20,)"),
}


@pytest.mark.parametrize(("step", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_map_that_does_not_fit_is_refused_when_it_is_added(step, message):
    with pytest.raises(ValueError, match=r".") as caught:
        Expression("a", (24, 20)).then(step)
    assert str(caught.value) == message


def test_the_input_side_of_a_bias_does_not_exist():
    with pytest.raises(ValueError, match=r"RotateInput needs a matrix \(rows, cols\), got shape \(24,\)"):
        Expression("a.bias", (24,)).then(RotateInput(12))


def test_json_of_an_unknown_map_is_refused():
    data = Expression("a", (24, 20)).then(RotateInput(20)).to_json()
    data["maps"][0]["map"] = "Shear"
    with pytest.raises(ValueError, match=f"unknown map 'Shear', needed one of {', '.join(MAPS)}"):
        Expression.from_json(data)


def test_json_that_does_not_fit_is_refused():
    data = Expression("a", (24, 20)).then(RotateInput(20)).to_json()
    data["shape"] = [24, 21]
    with pytest.raises(ValueError, match="does not divide 21"):
        Expression.from_json(data)


def test_a_source_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"a: got shape \(24, 20\), needed \(20, 24\)"):
        evaluate(Expression("a", (20, 24)), read)


def test_the_output_side_of_a_square_weight_is_not_its_input_side():
    expression = Expression("d", (24, 24)).then(RotateOutput(12, 7))
    expected = dense(24, 12, 7).T @ read("d").numpy()
    assert np.abs(evaluate(expression, read, torch.float64).numpy() - expected).max() <= 1e-12


def test_maps_of_other_rows_stand_in_their_order_whichever_came_first():
    """One weight that several rotations fold into is the same expression in any order of nodes."""
    first, last = RotateOutput(4, start=0, stop=8), RotateOutput(12, start=12, stop=24)
    weight = Expression("a", (24, 20)).then(RotateInput(4))
    assert weight.then(last).then(first) == weight.then(first).then(last)
    assert weight.then(last).then(first).maps == (RotateInput(4), first, last)


@pytest.mark.parametrize("second", [RotateOutput(4, start=8, stop=16), RotateOutput(4), RotateInput(4)])
def test_maps_of_the_same_rows_stay_in_the_order_in_which_they_came(second):
    first = RotateOutput(12, start=12, stop=24)
    assert Expression("a", (24, 20)).then(first).then(second).maps == (first, second)
