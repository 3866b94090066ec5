"""Equalized channels are the optimum that the derivation names, and do not see how a checkpoint was scaled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.equalizer import encode
from lrq_export.errors import UsageError
from lrq_export.quant.rotation import Rotation
from lrq_export.quant.transforms.equalize import SHARES, fit_equalizer

WIDTH = 24
SEEDS = st.integers(0, 2**31)


def problem(seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """E[x²] (24,) and two weights (., 24) whose columns differ by up to e^3."""
    generator = torch.Generator().manual_seed(seed)
    spread = [torch.randn(WIDTH, generator=generator, dtype=torch.float64).exp() for _ in range(2)]
    weights = [torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) * spread[0] for rows in (5, 7)]
    return spread[1].square(), weights


def energies(moment, weights, divisor):
    """Of the activations and of the weights, all channels together."""
    return (moment / divisor**2).sum(), torch.cat(weights).square().sum(0) @ divisor**2


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_for_activations_no_divisors_give_a_smaller_product_of_energies(seed):
    moment, weights = problem(seed)
    divisor = fit_equalizer(moment, weights, "activations").divisor.double()
    best = torch.stack(energies(moment, weights, divisor)).prod()
    sizes = moment.sqrt() @ torch.cat(weights).square().sum(0).sqrt()
    assert best == pytest.approx(float(sizes**2), rel=1e-5)  # the bound of Cauchy and Schwarz
    other = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed + 1)).exp()
    assert best <= torch.stack(energies(moment, weights, other.double())).prod() * (1 + 1e-6)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_for_weights_no_divisors_of_the_same_mean_give_less_energy(seed):
    moment, weights = problem(seed)
    divisor = fit_equalizer(moment, weights, "weights").divisor.double()
    assert divisor.log().mean() == pytest.approx(0, abs=1e-5)
    other = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed + 1)).double()
    other = (other - other.mean()).exp()
    assert energies(moment, weights, divisor)[1] <= energies(moment, weights, other)[1] * (1 + 1e-6)


def test_both_is_the_geometric_mean_of_the_optima_and_the_default():
    moment, weights = problem(0)
    divisor = fit_equalizer(moment, weights).divisor.double()
    wanted = moment.sqrt() ** 0.25 / torch.cat(weights).square().mean(0).sqrt() ** 0.75
    torch.testing.assert_close(divisor / divisor[0], wanted / wanted[0], rtol=1e-5, atol=0)
    assert torch.equal(fit_equalizer(moment, weights, "both").divisor, fit_equalizer(moment, weights).divisor)


@pytest.mark.parametrize("favour", SHARES)
def test_how_the_checkpoint_scales_its_channels_does_not_matter(favour):
    moment, weights = problem(0)
    scaling = torch.ones(WIDTH, dtype=torch.float64)
    scaling[[3, 17]], scaling[5] = 245.0, 0.01
    plain = fit_equalizer(moment, weights, favour)
    scaled = [weight / scaling for weight in weights]
    found = fit_equalizer(moment * scaling**2, scaled, favour)
    ratio = found.apply_to_weight(scaled[0]) / plain.apply_to_weight(weights[0])
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0]), rtol=1e-5, atol=0)


def test_silent_channels_get_finite_divisors():
    moment, weights = problem(0)
    moment[2], weights[0][:, 4], weights[1][:, 4] = 0, 0, 0
    divisor = fit_equalizer(moment, weights).divisor
    assert divisor.isfinite().all()
    assert divisor.min() > 0
    silent = fit_equalizer(torch.zeros(WIDTH), [torch.zeros(3, WIDTH)]).divisor
    assert torch.equal(silent, torch.ones(WIDTH))


@pytest.mark.parametrize("block", [1, 4, 12, 24])
@pytest.mark.parametrize("seed", [None, 3])
def test_the_function_stays(block, seed):
    moment, weights = problem(1)
    rotation = Rotation(WIDTH, block, seed, encode(fit_equalizer(moment, weights).divisor.numpy()))
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * moment.sqrt()
    exact = x @ weights[0].T
    assert (rotation.apply(x) @ rotation.apply_to_weight(weights[0]).T - exact).abs().max() < 1e-12 * exact.abs().max()
    assert (rotation.apply_inverse(rotation.apply(x)) - x).abs().max() < 1e-12 * x.abs().max()
    assert (rotation.apply(x) @ rotation.apply(weights[0]).T - exact).abs().max() > 1e-2 * exact.abs().max()
    assert rotation.parameters() == 32 * WIDTH
    assert rotation.flops_per_token == Rotation(WIDTH, block, seed).flops_per_token + WIDTH


def test_half_precision_is_divided_in_float32():
    """2^-20 times 2^20: the factor or the product would be lost in float16."""
    x = torch.full((1, 4), 2.0**-14, dtype=torch.float16)
    rotation = Rotation(4, 1, None, encode(torch.full((4,), 2.0**-20).numpy()))
    assert rotation.apply(x).tolist() == [[64.0] * 4]
    assert rotation.apply(x).dtype == torch.float16


def test_what_does_not_fit_is_refused():
    moment, weights = problem(0)
    with pytest.raises(UsageError, match="got 'all', needed one of activations, weights, both"):
        fit_equalizer(moment, weights, "all")
    for wrong in ([], [weights[0][:, 1:]]):
        with pytest.raises(UsageError, match=r"needed \(width,\) and at least one"):
            fit_equalizer(moment, wrong)
    with pytest.raises(UsageError, match="got 23 divisors, needed one for each of 24"):
        Rotation(24, 12, None, encode(torch.ones(23).numpy()))
