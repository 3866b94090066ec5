"""Every transform, alone and in a chain, leaves x W^T as it was, and stops doing so once a parameter is off."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrq_export.errors import UsageError
from lrq_export.quant.rotation import Rotation
from lrq_export.quant.transforms.balance import fit_balance
from lrq_export.quant.transforms.base import Chain, Identity, Transform
from lrq_export.quant.transforms.dual import DualTransform, fit_dual
from lrq_export.quant.transforms.scaling import ChannelScaling
from lrq_export.quant.transforms.smooth import fit_smooth

TOLERANCE = 1e-12  # relative, in float64


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_outliers(seed: int, tokens: int, width: int) -> torch.Tensor:
    x = normal(seed, tokens, width)
    x[:, :: max(1, width // 3)] *= 80
    return x


def smooth(tokens: torch.Tensor, weights: list[torch.Tensor], seed: int) -> ChannelScaling:
    return fit_smooth(tokens.abs().amax(0), weights)


def balance(tokens: torch.Tensor, weights: list[torch.Tensor], seed: int) -> ChannelScaling:
    return fit_balance(torch.stack([part.abs().amax(0) for part in tokens.chunk(3)]), weights)


def hadamard(tokens: torch.Tensor, weights: list[torch.Tensor], seed: int) -> Rotation:
    return Rotation(tokens.shape[1], block={240: 120, 288: 288, 1152: 1152, 4608: 4608}[tokens.shape[1]], seed=seed)


def dual(tokens: torch.Tensor, weights: list[torch.Tensor], seed: int) -> DualTransform:
    return fit_dual(tokens, steps=4, seed=seed)


def dual_as_released(tokens: torch.Tensor, weights: list[torch.Tensor], seed: int) -> DualTransform:
    return fit_dual(tokens, steps=4, seed=seed, as_released=True)


FITS = (smooth, balance, hadamard, dual, dual_as_released)


def loss_of_function(applied: Transform, undone: Transform, x: torch.Tensor, weight: torch.Tensor) -> float:
    """||x T (W U^-T)^T - x W^T|| relative to the exact product, U being T unless something went wrong."""
    exact = x @ weight.T
    return float((applied.apply(x) @ undone.apply_to_weight(weight).T - exact).norm() / exact.norm())


def check(transform: Transform, x: torch.Tensor, weight: torch.Tensor) -> None:
    assert isinstance(transform, Transform)
    assert transform.width == x.shape[-1]
    assert loss_of_function(transform, transform, x, weight) < TOLERANCE
    assert transform.apply(x).dtype == torch.float64
    assert transform.apply(x.float()).dtype == transform.apply_to_weight(weight.float()).dtype == torch.float32


@pytest.mark.parametrize("fit", FITS)
@given(width=st.sampled_from([240, 288, 1152]), seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_the_product_is_kept(fit, width, seed):
    tokens, weights = with_outliers(seed, 24, width), [normal(seed + 1, 8, width), normal(seed + 2, 12, width)]
    transform = fit(tokens, weights, seed)
    for weight in weights:
        check(transform, tokens, weight)
    assert (transform.apply(tokens) - tokens).norm() > 0.01 * tokens.norm()


@given(
    parts=st.lists(st.sampled_from(FITS), min_size=1, max_size=4),
    width=st.sampled_from([240, 288, 1152]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_the_product_is_kept_by_every_chain(parts, width, seed):
    tokens, weight = with_outliers(seed, 24, width), normal(seed + 1, 8, width)
    chain = Chain(tuple(fit(tokens, [weight], seed) for fit in parts))
    check(chain, tokens, weight)
    assert chain.parameters() == sum(part.parameters() for part in chain.parts)
    assert chain.flops_per_token == sum(part.flops_per_token for part in chain.parts)


def test_the_product_is_kept_for_the_widest_layer():
    tokens, weight = with_outliers(0, 16, 4608), normal(1, 8, 4608)
    scaling = smooth(tokens, [weight], 0)
    smoothed = scaling.apply(tokens)
    for rotation in (hadamard(smoothed, [], 3), dual(smoothed, [], 3)):
        check(Chain((scaling, rotation)), tokens, weight)


def test_parts_apply_from_left_to_right():
    tokens, weight = with_outliers(0, 16, 240), normal(1, 8, 240)
    first, second = smooth(tokens, [weight], 0), hadamard(tokens, [], 1)
    assert torch.equal(Chain((first, second)).apply(tokens), second.apply(first.apply(tokens)))
    swapped = Chain((second, first)).apply(tokens)
    assert (swapped - Chain((first, second)).apply(tokens)).norm() > 0.1 * swapped.norm()


def perturbed(transform: Transform) -> Transform:
    """The same transform with one parameter off by little."""
    if isinstance(transform, Rotation):
        return replace(transform, seed=transform.seed + 1)
    if isinstance(transform, ChannelScaling):
        divisor = transform.divisor.clone()
        divisor[5] *= 1.0001
        return replace(transform, divisor=divisor)
    rotation = transform.second.clone()
    rotation[3, 4] += 1e-4
    return replace(transform, second=rotation)


@pytest.mark.parametrize("fit", FITS)
def test_a_perturbed_parameter_changes_the_product(fit):
    tokens, weight = with_outliers(0, 24, 288), normal(1, 8, 288)
    transform = fit(tokens, [weight], 0)
    assert loss_of_function(transform, perturbed(transform), tokens, weight) > 1e3 * TOLERANCE
    chained = Chain((transform, hadamard(tokens, [], 1))), Chain((perturbed(transform), hadamard(tokens, [], 1)))
    assert loss_of_function(*chained, tokens, weight) > 1e3 * TOLERANCE


def test_side_data_and_work_are_counted():
    x, weights = normal(0, 8, 1152), [normal(1, 4, 1152)]
    counted = {fit.__name__: (t.parameters(), t.flops_per_token) for fit in FITS if (t := fit(x, weights, 0))}
    scaling, rotation = (16 * 1152, 1152), (2 * 16 * 128**2 + 16 * 1152, 4 * 128 * 1152)
    assert counted == {
        "smooth": scaling, "balance": scaling, "dual": rotation, "dual_as_released": rotation,
        "hadamard": (0, 2 * 1152 * (36 + 32)),  # H_1152 = H_36 (x) H_32
    }  # fmt: skip
    assert (Identity(1152).parameters(), Identity(1152).flops_per_token) == (0, 0)
    assert Rotation(240, 20).flops_per_token == 2 * 240 * 20  # so small a block is one dense product


def test_the_identity_does_nothing():
    x = normal(0, 2, 3, 8)
    assert torch.equal(Identity(8).apply(x), x)
    assert torch.equal(Identity(8).apply_to_weight(x), x)
    assert Identity(8).apply(x.half()).dtype == torch.float32


@pytest.mark.parametrize("transform", [Identity(8), ChannelScaling(torch.ones(8)), fit_dual(torch.eye(8), steps=1)])
def test_another_width_is_refused(transform):
    for refused in (transform.apply, transform.apply_to_weight):
        with pytest.raises(UsageError, match=r"got shape \(2, 9\), needed 8 channels"):
            refused(torch.ones(2, 9))


@pytest.mark.parametrize("parts", [(), (Identity(8), Identity(16))])
def test_a_chain_needs_one_width(parts):
    with pytest.raises(UsageError, match="at least one part and one width"):
        Chain(parts)
