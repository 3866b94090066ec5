"""Hadamard rotations preserve the function and cost no dense product."""

import pytest
import torch

from graphs.ops.hadamard import hadamard_matrix
from lrq_export.errors import UsageError
from lrq_export.quant import rotation
from lrq_export.quant.rotation import Rotation, hadamard_signs

SHAPES = [(72, 72), (288, 288), (288, 72), (288, 32), (1152, 1152), (4608, 4608), (3072, 128), (960, 20)]


@pytest.mark.parametrize(("width", "block"), SHAPES)
@pytest.mark.parametrize("seed", [None, 3])
def test_rotating_both_sides_keeps_the_product(width, block, seed):
    torch.manual_seed(0)
    x, weight = torch.randn(5, width, dtype=torch.float64), torch.randn(7, width, dtype=torch.float64)
    turned = Rotation(width, block, seed)
    exact = x @ weight.T
    assert (turned.apply(x) @ turned.apply(weight).T - exact).abs().max() < 1e-12 * exact.abs().max()
    assert (turned.apply_inverse(turned.apply(x)) - x).abs().max() < 1e-12
    assert (turned.apply(turned.apply_inverse(x)) - x).abs().max() < 1e-12
    assert (turned.apply(x) - x).abs().max() > 0.1


@pytest.mark.parametrize(("width", "block"), [(72, 72), (288, 288), (288, 72), (144, 36)])
def test_the_fast_transform_is_the_dense_one(width, block):
    turned = Rotation(width, block, seed=1)
    dense = torch.block_diag(*[torch.from_numpy(hadamard_matrix(block))] * (width // block))
    expected = turned.signs.double()[:, None] * dense
    identity = torch.eye(width, dtype=torch.float64)
    assert torch.allclose(turned.apply(identity), expected, atol=1e-13)
    assert torch.allclose(turned.apply_inverse(identity), expected.T, atol=1e-13)
    assert torch.allclose(expected @ expected.T, identity, atol=1e-13)


@pytest.mark.parametrize("block", [512, 1152, 4608, 12288, 15360])
def test_no_dense_product_is_wider_than_256(block):
    sizes = [len(matrix) for matrix in rotation._matrices(block, torch.float32)]
    assert max(sizes) <= 256
    assert torch.tensor(sizes).prod() == block


def test_an_outlier_channel_is_spread_and_types_are_kept():
    x = torch.zeros(2, 1152, dtype=torch.bfloat16)
    x[:, 7] = 245
    y = Rotation(1152, 1152, seed=0).apply(x)
    assert y.dtype == torch.bfloat16
    assert y.abs().max() < 8


def test_signs_are_the_same_for_ever():
    assert hadamard_signs(16, 0).tolist() == SIGNS_OF_SEED_0
    assert torch.equal(hadamard_signs(8, 0), hadamard_signs(16, 0)[:8])
    assert not torch.equal(hadamard_signs(64, 1), hadamard_signs(64, 2))
    assert abs(hadamard_signs(4608, 5).mean()) < 0.06
    hadamard_signs(16, 0).zero_()
    assert hadamard_signs(16, 0).abs().min() == 1


SIGNS_OF_SEED_0 = [1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1, -1, -1, 1, 1, 1]


@pytest.mark.parametrize(
    ("width", "block", "advice"), [(288, 100, "96 or 144"), (1152, 0, "set block to 2"), (7, 7, "do not")]
)
def test_an_impossible_block_is_refused_with_the_nearest_ones(width, block, advice):
    with pytest.raises(UsageError, match=f"got {block}, needed a divisor of {width}.*{advice}"):
        Rotation(width, block)


def test_the_wrong_width_is_refused():
    with pytest.raises(UsageError, match="channels"):
        Rotation(72, 72).apply(torch.ones(2, 100))
