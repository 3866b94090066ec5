"""DuQuant's dual transform, as paper and code have it: orthogonal, no larger peak, channels dealt out fairly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrq_export.errors import InputError, UsageError
from lrq_export.quant.transforms import dual
from lrq_export.quant.transforms.dual import boustrophedon, fit_dual, largest_block

SIZES = [1, 2, 3, 20, 96, 120, 128]


def tokens_with_outliers(seed: int, width: int, outliers: int, tokens: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    x[:, torch.randperm(width, generator=generator)[:outliers]] *= 60
    return x


def off_orthogonal(matrix: torch.Tensor) -> float:
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max())


@pytest.mark.parametrize("as_released", [False, True], ids=["paper", "released"])
@given(seed=st.integers(0, 2**31), width=st.sampled_from([240, 288, 1152]), outliers=st.integers(0, 8))
@settings(max_examples=6, deadline=None)
def test_rotations_are_orthogonal_and_channels_are_only_dealt_out(as_released, seed, width, outliers):
    transform = fit_dual(tokens_with_outliers(seed, width, outliers), steps=12, seed=seed, as_released=as_released)
    assert transform.first.dtype == transform.second.dtype == torch.float64
    assert off_orthogonal(transform.first) < 1e-12
    assert off_orthogonal(transform.second) < 1e-12
    assert transform.permutation.sort().values.tolist() == list(range(width))


def test_256_steps_stay_orthogonal():
    search, generator = dual._PAPER, torch.Generator().manual_seed(0)
    total = torch.eye(128, dtype=torch.float64)
    for index in range(256):
        step = search.spread(dual._flat_base(128), dual._fixing_first(128, generator))
        total = total @ dual._swapped(step, index % 128)
    assert off_orthogonal(total) < 1e-12


@given(
    seed=st.integers(0, 2**31), width=st.sampled_from([240, 288]), outliers=st.integers(0, 8), steps=st.integers(0, 20)
)
@settings(max_examples=20, deadline=None)
def test_the_greedy_peak_never_increases(seed, width, outliers, steps):
    y = tokens_with_outliers(seed, width, outliers).reshape(-1, largest_block(width))
    peaks = []
    for most in (0, steps, steps + 5):  # more steps find what fewer did, or better
        rotation = dual._greedy_rotation(y, most, torch.Generator().manual_seed(seed), dual._PAPER)
        peaks.append(float((y @ rotation).abs().max()))
    assert peaks[0] == y.abs().max()
    assert peaks[1] <= peaks[0] * (1 + 1e-12)
    assert peaks[2] <= peaks[1] * (1 + 1e-12)


def test_no_step_is_kept_where_none_helps():
    flat = torch.ones(5, 120) * torch.tensor([1.0, -1.0]).repeat(60)  # every rotation can only raise its peak
    transform = fit_dual(flat.repeat(1, 2), steps=20)
    assert torch.equal(transform.first, torch.eye(120, dtype=torch.float64))


def test_outliers_are_spread_by_the_paper_and_by_the_code():
    x = tokens_with_outliers(0, 1152, 6)
    paper, released = (fit_dual(x, steps=64, as_released=each).apply(x).abs().max() for each in (False, True))
    assert paper < x.abs().max() / 8
    assert released < x.abs().max() / 8
    assert paper != released


@pytest.mark.parametrize("size", SIZES)
def test_the_paper_keeps_a_flat_first_row_and_the_code_a_first_column(size):
    base, fixing = dual._flat_base(size), dual._fixing_first(size, torch.Generator().manual_seed(3))
    paper, released = dual._PAPER.spread(base, fixing), dual._RELEASED.spread(base, fixing)
    for matrix in (base, fixing, paper, released):
        assert off_orthogonal(matrix) < 1e-13
    assert torch.allclose(base[0], torch.full((size,), size**-0.5, dtype=torch.float64), rtol=1e-13)
    assert torch.allclose(paper[0], base[0], rtol=1e-12)
    assert torch.allclose(released[:, 0], base[:, 0], rtol=1e-12)
    if size > 2:  # diag(1, Q') is not the identity, so the other order keeps neither
        assert (released[0] - base[0]).abs().max() > 0.01
        assert (paper[1:] - base[1:]).abs().max() > 0.01


def test_a_step_spreads_the_outlier_column_evenly():
    y = torch.zeros(7, 20, dtype=torch.float64)
    y[4, 13] = -90
    peak, index = dual._PAPER.outlier(y)
    assert (peak, index) == (90, 13)
    assert dual._RELEASED.outlier(y) == (90, 4)
    step = dual._swapped(dual._PAPER.spread(dual._flat_base(20), dual._fixing_first(20, torch.Generator())), index)
    assert torch.allclose((y @ step)[4].abs(), torch.full((20,), 90 / 20**0.5, dtype=torch.float64))


@given(blocks=st.integers(1, 12), block=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_channels_are_dealt_in_boustrophedon_order(blocks, block, seed):
    peaks = torch.rand(blocks * block, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    permutation = boustrophedon(peaks, blocks)
    assert permutation.sort().values.tolist() == list(range(blocks * block))
    hands = [[] for _ in range(blocks)]  # dealt one by one, as the paper tells it
    for turn, channel in enumerate(peaks.sort(descending=True).indices.tolist()):
        rank, place = divmod(turn, blocks)
        hands[place if rank % 2 == 0 else blocks - 1 - place].append(channel)
    assert permutation.tolist() == [channel for hand in hands for channel in hand]


def test_every_block_gets_its_share_of_the_outliers():
    x = torch.ones(4, 1152)
    x[:, :18] = 100  # all in the first of nine blocks
    permutation = fit_dual(x, steps=0).permutation
    assert (permutation.reshape(9, 128) < 18).sum(1).tolist() == [2] * 9


def test_the_same_seed_gives_the_same_transform_and_another_seed_another():
    x = tokens_with_outliers(0, 288, 3)
    one, same, other = (fit_dual(x, steps=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.first, same.first)
    assert torch.equal(one.permutation, same.permutation)
    assert not torch.equal(one.first, other.first)


@pytest.mark.parametrize(("width", "block"), [(1152, 128), (4608, 128), (240, 120), (288, 96), (72, 72), (131, 1)])
def test_the_block_is_the_largest_that_divides_the_width(width, block):
    assert largest_block(width) == block
    assert fit_dual(torch.ones(1, width), steps=0).block == block


@pytest.mark.parametrize("block", [0, 100, -96])
def test_a_block_that_does_not_divide_is_refused_with_one_that_does(block):
    with pytest.raises(UsageError, match=f"got block {block}, needed a divisor of 288 channels. Fix: set block to 96"):
        fit_dual(torch.ones(4, 288), block)


def test_bad_tokens_are_refused():
    with pytest.raises(UsageError, match=r"shape \(2, 3, 4\), needed \(n, width\)"):
        fit_dual(torch.ones(2, 3, 4))
    with pytest.raises(InputError, match="NaN"):
        fit_dual(torch.tensor([[1.0, float("nan")]]))
