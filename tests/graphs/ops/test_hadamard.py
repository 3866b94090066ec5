"""Hadamard matrices are what their definition says, and the fast transform multiplies by them."""

from __future__ import annotations

import numpy as np
import pytest

from graphs.ops.hadamard import (
    MAX_DENSE,
    MAX_SIZE,
    Factors,
    UnsupportedSize,
    base_matrix,
    factorize,
    hadamard_matrix,
    split,
    supported,
    transform,
)

PALEY = {12: 11, 20: 19, 28: 13, 36: 17, 60: 59, 76: 37, 84: 83, 108: 107, 124: 61, 140: 139}


@pytest.mark.parametrize(("base", "order"), PALEY.items())
def test_paley_matrices_are_hadamard(base, order):
    matrix = base_matrix(base, order).astype(int)
    assert set(np.unique(matrix)) == {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, base * np.eye(base, dtype=int))
    assert factorize(base) == Factors(base, order, 1)


@pytest.mark.parametrize("n", [1, 2, 8, 24, 40, 56, 64, 72, 120, 128, 256, 288])
def test_matrices_are_orthogonal(n):
    matrix = hadamard_matrix(n)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-12)


def test_powers_of_two_are_in_sylvester_order():
    index = np.arange(64)
    signs = 1 - 2 * np.array([[(i & j).bit_count() % 2 for j in index.tolist()] for i in index.tolist()])
    np.testing.assert_allclose(hadamard_matrix(64), signs / 8)


@pytest.mark.parametrize("n", [12, 64, 72, 96, 128, 160, 288, 768, 1152])
@pytest.mark.parametrize("inverse", [False, True])
def test_transform_multiplies_every_block_by_the_matrix(n, inverse):
    x = np.random.default_rng(n).standard_normal((2, 3, 2 * n))
    matrix = hadamard_matrix(n).T if inverse else hadamard_matrix(n)
    expected = (x.reshape(2, 3, 2, n) @ matrix).reshape(x.shape)
    np.testing.assert_allclose(transform(x, n, inverse=inverse), expected, atol=1e-12)


@pytest.mark.parametrize("n", [3072, 4608, 12288, 15360])
def test_wide_transforms_mix_every_channel_and_can_be_undone(n):
    x = np.random.default_rng(n).standard_normal((2, n))
    unit = np.zeros((1, n))
    unit[0, n // 3] = 1
    np.testing.assert_allclose(np.abs(transform(unit, n)), 1 / np.sqrt(n), atol=1e-12)
    np.testing.assert_allclose(transform(transform(x, n), n, inverse=True), x, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_transform_keeps_type_and_shape(dtype):
    y = transform(np.ones((2, 72), dtype), 36)
    assert (y.dtype, y.shape) == (dtype, (2, 72))


def test_no_factor_is_larger_than_a_dense_product_may_be():
    sizes = [n for n in range(1, MAX_SIZE + 1, 4) if supported(n)] + [2**m for m in range(17)]
    sizes += [n for n in range(4, MAX_SIZE + 1, 4) if supported(n)]
    for n in sizes:
        left, right = split(factorize(n))
        assert max(left.size, right.size) <= MAX_DENSE
        assert left.size * right.size == n


@pytest.mark.parametrize(
    ("n", "advice"),
    [
        (2944, "use block = 128"),
        (22, "use block = 2"),
        (15, "do not rotate"),
        (2**40, "use block = 65536"),
        (0, "do not rotate"),
    ],
)
def test_an_unsupported_size_names_a_block_that_works(n, advice):
    assert not supported(n)
    with pytest.raises(UnsupportedSize, match=f"no Hadamard matrix of size {n}.*{advice}"):
        factorize(n)


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="block 64 does not divide the 72 channels"):
        transform(np.zeros((1, 72)), 64)
