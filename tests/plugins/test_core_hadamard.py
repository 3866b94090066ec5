"""plugins/core builds the Hadamard matrices of graphs.ops.hadamard and rotates by them."""

import ctypes

import numpy as np
import pytest
from core_library import BAD_BLOCK, BAD_FORMAT, BAD_SIZE, BAD_VALUE, NULL_POINTER, OK, TokenRotation, address, call
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.ops.hadamard import MAX_SIZE, base_matrix, factorize, hadamard_matrix, supported, transform

pytestmark = pytest.mark.usefixtures("no_undefined_behaviour")

BLOCKS = [block for block in range(1, MAX_SIZE + 1) if supported(block)]
# (base, order) -> the smallest block that has them: one of each Paley size, 12, 20, 28, 36, 60, 76, 108, 140, ...
BASES = {(factors.base, factors.order): block for block in reversed(BLOCKS) if (factors := factorize(block))}
NMSE = 1e-12  # sums of up to `block` terms in another order, as HadamardRotate's tolerance says


def factors_of(core, block):
    found = (ctypes.c_int32 * 3)()
    return core.lrqHadamardFactors(block, found), tuple(found)


def matrix_of(core, base, order):
    matrix = np.empty((base, base), np.int8)
    call(core, "lrqHadamardMatrix", base, order, address(matrix), matrix.size)
    return matrix


def rotation(x, signs, block, /, **changes):
    tokens, channels = x.shape
    fields = {"x": address(x), "signs": address(signs), "tokens": tokens, "channels": channels, "block": block}
    return TokenRotation(**fields | changes)


def rotated(core, x, signs, block):
    y = np.empty_like(x)
    call(core, "lrqRotateTokens", ctypes.byref(rotation(x, signs, block)), address(y))
    return y


def nmse(got, expected):
    return np.square(got - expected, dtype=np.float64).sum() / np.square(expected, dtype=np.float64).sum()


def test_every_size_factorizes_as_in_the_reference(core):
    for block in BLOCKS:
        expected = factorize(block)
        assert factors_of(core, block) == (OK, (expected.base, expected.order, expected.power))
    assert {12, 20, 28, 36, 60, 76, 108, 140} <= {base for base, _ in BASES}


def test_sizes_without_a_matrix_are_refused(core):
    with_one = set(BLOCKS)
    hostile = (0, -1, -(2**63), 2**63 - 1, MAX_SIZE + 1, 2 * MAX_SIZE, 2**32 + 12)
    for block in (*range(-300, 0), *(block for block in range(1, 5000) if block not in with_one), *hostile):
        assert factors_of(core, block)[0] == BAD_BLOCK, block
    assert core.lrqHadamardFactors(12, None) == NULL_POINTER


@pytest.mark.parametrize(("base", "order"), BASES)
def test_every_base_matrix_is_the_reference_matrix(core, base, order):
    np.testing.assert_array_equal(matrix_of(core, base, order), base_matrix(base, order))


def test_base_matrices_that_do_not_exist_are_refused(core):
    matrix = np.full(256 * 256, 99, np.int8)
    for base, order in ((12, 7), (12, 0), (13, 11), (24, 11), (2, 0), (10, 9), (516, 257), (-(2**31), 2**31 - 1)):
        assert core.lrqHadamardMatrix(base, order, address(matrix), base * base) == BAD_BLOCK, (base, order)
    assert core.lrqHadamardMatrix(12, 11, address(matrix), 145) == BAD_SIZE
    assert core.lrqHadamardMatrix(12, 11, None, 144) == NULL_POINTER
    assert (matrix == 99).all()


@pytest.mark.parametrize("block", [*BASES.values(), 2, 64, 128, 256, 1152, 3072, 4608, 12288, MAX_SIZE])
def test_tokens_are_rotated_as_in_the_reference(core, block):
    rng = np.random.default_rng(block)
    x = rng.standard_normal((2, block * (3 if block < 300 else 1)), np.float32)
    signs = rng.choice(np.float32([-1, 1, 0.5]), x.shape[1])
    y = rotated(core, x, signs, block)
    expected = transform(x * signs, block)
    assert nmse(y, expected) < NMSE
    signs[-1] *= -1
    if block > 1:
        assert nmse(rotated(core, x, signs, block), expected) > NMSE
    assert nmse(rotated(core, y, np.ones_like(signs), block), expected) > NMSE or block == 1


@given(st.sampled_from([block for block in BLOCKS if block <= 512]), st.integers(1, 3), st.integers(1, 3), st.randoms())
@settings(deadline=None, max_examples=40)
def test_any_block_is_a_product_with_the_dense_matrix(core, block, tokens, blocks, random):
    rng = np.random.default_rng(random.getrandbits(32))
    x = rng.standard_normal((tokens, blocks * block), np.float32)
    dense = np.kron(np.eye(blocks), hadamard_matrix(block))
    assert nmse(rotated(core, x, np.ones(x.shape[1], np.float32), block), x @ dense) < NMSE
    # H^T is not H where the base matrix is skew: a transposed transform does not pass.
    if factorize(block).order % 4 == 3:
        assert nmse(rotated(core, x, np.ones(x.shape[1], np.float32), block), x @ dense.T) > 1e-3


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"x": None}, NULL_POINTER),
        ({"signs": None}, NULL_POINTER),
        ({"prologue": -1}, BAD_FORMAT),
        ({"prologue": 7}, BAD_FORMAT),
        ({"tokens": 0}, BAD_SIZE),
        ({"channels": -24}, BAD_SIZE),
        ({"channels": 2**63 - 1}, BAD_SIZE),
        ({"block": 0}, BAD_BLOCK),
        ({"block": -12}, BAD_BLOCK),
        ({"block": 10}, BAD_BLOCK),
        ({"block": 48}, BAD_BLOCK),
        ({"prologue": 1}, NULL_POINTER),
        ({"prologue": 2, "scale": 1}, NULL_POINTER),
        ({"prologue": 1, "scale": 1, "shift": 1, "epsilon": -1e-6}, BAD_VALUE),
        ({"prologue": 1, "scale": 1, "shift": 1, "epsilon": float("nan")}, BAD_VALUE),
        ({"prologue": 2, "scale": 1, "shift": 1, "epsilon": float("inf")}, BAD_VALUE),
    ],
    ids=str,
)
def test_hostile_fields_are_refused_and_nothing_is_written(core, changes, status):
    x, signs, y = np.zeros((2, 24), np.float32), np.ones(24, np.float32), np.full((2, 24), 99, np.float32)
    assert core.lrqRotateTokens(ctypes.byref(rotation(x, signs, 12, **changes)), address(y)) == status
    assert core.lrqRotateTokens(ctypes.byref(rotation(x, signs, 12)), None) == NULL_POINTER
    assert core.lrqRotateTokens(None, address(y)) == NULL_POINTER
    assert (y == 99).all()
