"""SmoothQuant and PTQ4DiT: their factors are those of the papers, and fold exactly into a real DiT block."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st

from lrq_export.errors import InputError, UsageError
from lrq_export.quant.transforms.balance import (
    average_ranks,
    fit_balance,
    fold_into_adaln,
    fold_into_linear,
    spearman,
)
from lrq_export.quant.transforms.scaling import ChannelScaling
from lrq_export.quant.transforms.smooth import SMALLEST, fit_smooth

WIDTH = 24


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_smoothing_factors_are_those_of_the_paper(alpha):
    absmax = torch.tensor([8.0, 2.0, 0.5])
    weights = [torch.tensor([[1.0, -4.0, 2.0]]), torch.tensor([[0.5, 1.0, -3.0], [-2.0, 0.0, 1.0]])]
    expected = absmax**alpha / torch.tensor([2.0, 4.0, 3.0]) ** (1 - alpha)  # maxima over all siblings
    assert torch.allclose(fit_smooth(absmax, weights, alpha).divisor, expected)


def test_smoothing_by_half_makes_both_sides_peak_alike():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 96, generator=generator) * 30, torch.randn(8, 96, generator=generator)
    smooth = fit_smooth(x.abs().amax(0), [weight])
    peaks = smooth.apply(x).abs().amax(0), smooth.apply_to_weight(weight).abs().amax(0)
    assert torch.allclose(*peaks, rtol=1e-5)


def test_channels_that_are_always_zero_get_a_finite_factor():
    smooth = fit_smooth(torch.tensor([0.0, 4.0, 0.0]), [torch.tensor([[4.0, 0.0, 0.0]])])
    assert smooth.divisor.tolist() == pytest.approx([(SMALLEST / 4) ** 0.5, (4 / SMALLEST) ** 0.5, 1])


def test_balance_weighs_timesteps_by_how_little_they_agree_with_the_weights():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    alike, opposed = torch.tensor([10.0, 20.0, 30.0, 40.0]), torch.tensor([8.0, 6.0, 4.0, 2.0])  # ρ = 1 and -1
    share = torch.tensor([-1.0, 1.0]).exp() / torch.tensor([-1.0, 1.0]).exp().sum()
    salience = share[0] * alike + share[1] * opposed
    balance = fit_balance(torch.stack([alike, opposed]), [weight])
    assert torch.allclose(balance.divisor, (salience / weight[0]).sqrt())


@given(order=st.permutations(range(12)))
@settings(max_examples=50, deadline=None)
def test_spearman_without_ties_is_the_textbook_formula(order):
    ranks = torch.tensor(order, dtype=torch.float64)
    distance = sum((rank - place) ** 2 for place, rank in enumerate(order))
    assert spearman(ranks.exp(), torch.arange(12.0)).item() == pytest.approx(1 - 6 * distance / (12 * 143), abs=1e-12)


def test_ties_share_their_mean_rank_and_a_constant_agrees_with_nothing():
    assert average_ranks(torch.tensor([5.0, 1.0, 5.0, 2.0, 5.0])).tolist() == [4, 1, 4, 2, 4]
    # By hand: ranks (1.5, 1.5, 3) and (1, 2.5, 2.5): covariance 0.75 over variances 1.5 and 1.5.
    assert spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 3.0])).item() == pytest.approx(0.5)
    assert spearman(torch.ones(4), torch.arange(4.0)) == 0


@pytest.fixture
def block() -> BasicTransformerBlock:
    """A block of diffusers' DiT, AdaLayerNormZero and all, of random weights in float64."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(
        WIDTH, 2, WIDTH // 2, num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        activation_fn="gelu-approximate", attention_bias=True,
    )  # fmt: skip
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.double().eval()


@torch.no_grad()
def output(block: BasicTransformerBlock) -> torch.Tensor:
    x = torch.randn(3, 16, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return block(x, timestep=torch.tensor([0, 400, 999]), class_labels=torch.tensor([1, 2, 3]))


def balance_for(layers: list[torch.nn.Linear], seed: int = 2) -> ChannelScaling:
    absmax = torch.rand(5, WIDTH, generator=torch.Generator().manual_seed(seed)) * 20
    return fit_balance(absmax, [layer.weight for layer in layers])


def chunk(index: int) -> slice:
    return slice(index * WIDTH, (index + 1) * WIDTH)


@torch.no_grad()
def fold_everything(block: BasicTransformerBlock) -> dict[str, ChannelScaling]:
    """Balance q, k and v, the MLP's first layer and the attention's output; fold every factor; return them."""
    attention, adaln = block.attn1, block.norm1.linear
    consumers = {
        "qkv": [attention.to_q, attention.to_k, attention.to_v],
        "out": [attention.to_out[0]],
        "mlp": [block.ff.net[0].proj],
    }
    balances = {name: balance_for(layers, seed) for seed, (name, layers) in enumerate(consumers.items())}
    for name, layers in consumers.items():
        for layer in layers:
            layer.weight.data = balances[name].apply_to_weight(layer.weight)
    for name, first in (("qkv", 0), ("mlp", 3)):  # shift, scale and gate of the attention, then of the MLP
        weight, bias = fold_into_adaln(balances[name], adaln.weight, adaln.bias, chunk(first), chunk(first + 1))
        adaln.weight.data, adaln.bias.data = weight, bias
    value = attention.to_v
    value.weight.data, value.bias.data = fold_into_linear(balances["out"], value.weight, value.bias)
    return balances


def test_folding_keeps_the_output_of_a_dit_block(block):
    before = output(block)
    balances = fold_everything(block)
    assert all((balance.divisor / balance.divisor.mean() - 1).abs().max() > 0.2 for balance in balances.values())
    assert (output(block) - before).norm() < 1e-12 * before.norm()


@pytest.mark.parametrize("parameter", ["norm1.linear.bias", "norm1.linear.weight", "attn1.to_v.bias"])
def test_an_error_in_folding_shows(block, parameter):
    before = output(block)
    fold_everything(block)
    block.get_parameter(parameter).data[:WIDTH] *= 1.001
    assert (output(block) - before).norm() > 1e-9 * before.norm()


def test_gates_and_the_given_tensors_are_left_alone(block):
    adaln = block.norm1.linear
    before, balance = adaln.weight.clone(), balance_for([block.attn1.to_q])
    rows = torch.arange(WIDTH)
    weight, bias = fold_into_adaln(balance, adaln.weight, adaln.bias, rows, rows + WIDTH)
    assert torch.equal(adaln.weight, before)
    assert torch.equal(weight[2 * WIDTH :], before[2 * WIDTH :])
    assert torch.equal(bias[2 * WIDTH :], adaln.bias[2 * WIDTH :])
    assert (weight[: 2 * WIDTH] - before[: 2 * WIDTH]).abs().max() > 0.01
    half = fold_into_linear(balance, block.attn1.to_v.weight.half(), None)
    assert (half[0].dtype, half[1]) == (torch.float32, None)


def test_wrong_shapes_are_refused():
    balance, weight = ChannelScaling(torch.ones(WIDTH)), torch.ones(3, WIDTH)
    with pytest.raises(UsageError, match="got 23 rows, needed 24"):
        fold_into_adaln(balance, torch.ones(48, 4), torch.ones(48), slice(0, 23), slice(24, 48))
    with pytest.raises(UsageError, match="got 3 rows, needed 24"):
        fold_into_linear(balance, weight, None)
    with pytest.raises(UsageError, match=r"needed at least one \(rows, 24\)"):
        fit_smooth(torch.ones(WIDTH), [weight, torch.ones(3, 25)])
    with pytest.raises(UsageError, match="at least one"):
        fit_smooth(torch.ones(WIDTH), [])
    with pytest.raises(UsageError, match=r"needed \(width,"):
        fit_smooth(torch.ones(2, WIDTH), [weight])
    with pytest.raises(UsageError, match="got alpha 2"):
        fit_smooth(torch.ones(WIDTH), [weight], alpha=2)
    with pytest.raises(UsageError, match=r"needed \(steps, width"):
        fit_balance(torch.ones(WIDTH), [weight])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_cannot_be_undone_are_refused(bad):
    scaling = ChannelScaling(torch.ones(3))
    with pytest.raises(InputError, match="needed positive and finite"):
        replace(scaling, divisor=torch.tensor([1.0, bad, 1.0]))
    with pytest.raises(UsageError, match="needed float32"):
        ChannelScaling(torch.ones(3, 3))
