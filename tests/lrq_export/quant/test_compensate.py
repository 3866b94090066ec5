"""Error-compensated rounding: a smaller output error than nearest rounding, on any codebook."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrq_export.quant import compensate
from lrq_export.quant.codebook_weight import nearest as nearest_codes
from lrq_export.quant.compensate import Feedback, conditional_variances, inverse_factor, quantize_compensated

ROWS, COLS, LEVELS = 16, 40, 8


def correlated_inputs(cols: int = COLS, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """Inputs (tokens, cols) that live near a few directions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols // 4, cols, generator=generator)
    noise = torch.randn(tokens, cols, generator=generator)
    return torch.randn(tokens, cols // 4, generator=generator) @ mix + 0.2 * noise


def problem(seed: int = 0, groups: int = 1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLS, generator=generator)
    values = torch.sort(2 * torch.randn(ROWS, groups, LEVELS, generator=generator)).values
    x = correlated_inputs(seed=seed)
    return weight, values, x, x.T @ x / len(x)


def rounded_codes(weight, values, group_size, moments) -> torch.Tensor:
    """Codes into the codebooks as they are, none widened."""
    assert values.shape[1] * group_size == weight.shape[1]
    return Feedback(moments).round(weight, values).codes


def decode(values: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    group = torch.arange(codes.shape[1]) // group_size
    return torch.stack([values[:, g].gather(1, codes[:, j : j + 1].long())[:, 0] for j, g in enumerate(group)], dim=1)


def nearest(weight: torch.Tensor, values: torch.Tensor, group_size: int) -> torch.Tensor:
    group = torch.arange(weight.shape[1]) // group_size
    return (values[:, group] - weight[..., None]).abs().argmin(-1)


def output_error(weight, rounded, x) -> float:
    return float((x @ (weight - rounded).T).square().mean())


@pytest.mark.parametrize(("groups", "group_size"), [(1, 40), (4, 10)])
def test_the_output_error_is_well_below_that_of_nearest_rounding(groups, group_size):
    weight, values, x, moments = problem(groups=groups)
    compensated = decode(values, rounded_codes(weight, values, group_size, moments), group_size)
    plain = decode(values, nearest(weight, values, group_size), group_size)
    assert output_error(weight, compensated, x) < 0.5 * output_error(weight, plain, x)


def test_uncorrelated_inputs_leave_nearest_rounding_as_it_is():
    weight, values, _, _ = problem()
    codes = rounded_codes(weight, values, COLS, torch.eye(COLS))
    assert torch.equal(codes.long(), nearest(weight, values, COLS))


def test_the_result_does_not_depend_on_the_size_of_the_blocks(monkeypatch):
    weight, values, x, moments = problem()
    whole = rounded_codes(weight, values, COLS, moments)
    monkeypatch.setattr(compensate, "BLOCK", 7)
    blocked = rounded_codes(weight, values, COLS, moments)
    # The same sums in another order: a value at a boundary may fall the other way, the error may not.
    assert (whole != blocked).float().mean() < 0.05
    errors = [output_error(weight, decode(values, codes, COLS), x) for codes in (whole, blocked)]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_any_inputs_give_finite_codes_within_the_codebook(seed, tokens):
    weight, values, _, _ = problem(seed)
    x = correlated_inputs(tokens=tokens, seed=seed)  # fewer tokens than columns: H is singular
    codes = rounded_codes(weight, values, COLS, x.T @ x / tokens)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < LEVELS


def test_the_factor_is_that_of_the_damped_inverse():
    moments = problem()[3].double()
    damped = moments + compensate.DAMPING * moments.diagonal().mean() * torch.eye(COLS, dtype=torch.float64)
    factor = inverse_factor(compensate.damped(moments.double())).double()
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)
    assert torch.equal(factor, factor.triu())


def test_inputs_that_are_zero_throughout_are_rounded_to_nearest():
    weight, values, _, _ = problem()
    codes = rounded_codes(weight, values, COLS, torch.zeros(COLS, COLS))
    assert torch.equal(codes.long(), nearest(weight, values, COLS))


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("block", [128, 7])  # columns updated at once: more than all of them, and several of a group
def test_uncorrelated_columns_go_to_the_nearest_value_of_their_own_group(monkeypatch, groups, block):
    monkeypatch.setattr(compensate, "BLOCK", block)
    weight, values, _, _ = problem(groups=groups)
    codes = rounded_codes(weight, values, COLS // groups, torch.eye(COLS))
    assert torch.equal(codes.long(), nearest(weight, values, COLS // groups))


def lost(weight, rounded, moments) -> torch.Tensor:
    """Output error of every row, (rows,), as the damped H has it."""
    error = (weight - rounded).double()
    return ((error @ compensate.damped(moments.double())) * error).sum(1)


@pytest.mark.parametrize("groups", [1, 4])
def test_each_row_keeps_the_widening_with_the_least_output_error(groups):
    weight, values, _, moments = problem(seed=3, groups=groups)
    feedback = Feedback(moments)

    def errors(rounding) -> torch.Tensor:
        rounded = decode(values, rounding.codes, COLS // groups) * rounding.widening[:, None]
        return lost(weight, rounded, moments)

    chosen = feedback.round(weight, values, compensate.WIDENINGS)
    alone = [errors(feedback.round(weight, values, (each,))) for each in compensate.WIDENINGS]
    torch.testing.assert_close(errors(chosen), torch.stack(alone).amin(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(errors(chosen), chosen.error, rtol=1e-4, atol=0)
    assert len(set(chosen.widening.tolist())) > 1


def test_importance_is_what_no_later_column_can_make_good():
    """The least error e H eᵀ with e_j = 1, e of earlier columns 0, over all errors of the later ones."""
    _, _, _, moments = problem()
    matrix, found = compensate.damped(moments.double()), Feedback(moments).importance
    order = moments.diagonal().argsort(descending=True, stable=True).tolist()
    for place in (0, 7, COLS - 1):
        column, later = order[place], order[place + 1 :]
        rest, cross = matrix[later][:, later], matrix[later, column]
        least = matrix[column, column] - cross @ torch.linalg.solve(rest, cross) if later else matrix[column, column]
        torch.testing.assert_close(found[column], least, rtol=1e-4, atol=0)
    added = compensate.DAMPING * moments.diagonal().double().mean()
    torch.testing.assert_close(conditional_variances(moments).double() + added, found, rtol=1e-4, atol=0)


def evenly_spaced(weight: torch.Tensor, importance: torch.Tensor):
    """Eight values over each row's range."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return nearest_codes(weight, low + (high - low) * torch.linspace(0, 1, LEVELS))


def test_refitting_to_the_carried_weights_only_lowers_the_output_error():
    weight, _, _, moments = problem(seed=5)
    feedback = Feedback(moments)
    errors = [
        lost(weight, quantize_compensated(weight, feedback, evenly_spaced, refits=refits).dequantize(), moments)
        for refits in range(3)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[2] <= errors[1] * (1 + 1e-5)).all()
    assert errors[2].sum() < 0.95 * errors[0].sum()


def test_the_carried_weights_are_what_was_rounded():
    weight, values, _, moments = problem()
    rounding = Feedback(moments).round(weight, values)
    assert torch.equal(nearest(rounding.carried, values, COLS), rounding.codes.long())
    first = int(moments.diagonal().argmax())
    assert torch.equal(rounding.carried[:, first], weight[:, first])
    assert not torch.equal(rounding.carried, weight)


def test_columns_are_rounded_in_the_order_of_their_inputs_power():
    """One loud input and one quiet one that repeats it: the quiet one's weight, rounded last, makes up for the loss."""
    moments = torch.tensor([[0.01, 0.1], [0.1, 1.0]]) + 1e-6 * torch.eye(2)
    values = torch.arange(-8, 9).float().view(1, 1, -1)
    codes = rounded_codes(torch.tensor([[0.0, 0.4]]), values, 2, moments)
    made_up = 0.4 * 0.1 / (0.01 + compensate.DAMPING * 0.505)
    assert decode(values, codes, 2).tolist() == [[round(made_up), 0.0]]


def test_codebooks_are_fitted_by_importance_and_then_to_the_carried_weights():
    weight, _, _, moments = problem(seed=5)
    fits = []

    def fit(wanted, importance):
        fits.append((wanted.clone(), importance))
        return evenly_spaced(wanted, importance)

    quantize_compensated(weight, Feedback(moments), fit)
    feedback = Feedback(moments)
    assert len(fits) == 2
    assert all(torch.equal(importance, feedback.importance) for _, importance in fits)
    assert torch.equal(fits[0][0], weight)
    first = feedback.round(weight, evenly_spaced(weight, None).codebooks(), compensate.WIDENINGS)
    assert torch.equal(fits[1][0], first.carried)


def test_rows_may_widen_their_codebooks_by_default():
    weight, _, _, moments = problem(seed=5)

    def clipped(wanted, importance):
        """Half of the range: too narrow for carried errors."""
        fitted = evenly_spaced(wanted, importance)
        return type(fitted)(fitted.codes, fitted.values / 2)

    default = quantize_compensated(weight, Feedback(moments), clipped).dequantize()
    narrow = quantize_compensated(weight, Feedback(moments), clipped, widenings=(1.0,)).dequantize()
    assert lost(weight, default, moments).sum() < 0.9 * lost(weight, narrow, moments).sum()


def test_less_damping_leaves_less_error_where_a_few_inputs_are_loud():
    """What GPTQ's share of the mean adds is far above the quiet inputs' own power."""
    weight, values, x, _ = problem(seed=7)
    x[:, :2] *= 200
    moments = x.T @ x / len(x)

    def error(damping: float) -> float:
        rounded = decode(values, Feedback(moments, damping).round(weight, values).codes, COLS)
        return float(((weight - rounded) @ moments * (weight - rounded)).sum())

    assert error(compensate.DAMPING) < error(compensate.GPTQ_DAMPING)
