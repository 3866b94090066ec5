"""The integer arithmetic of TwinLogDequant, against a transcription of its equations in Python's unbounded integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.ops import packing
from graphs.ops.spec import Example
from graphs.ops.twin_log_dequant import (
    MAX_FRACTION_BITS,
    MAX_INTEGER_BITS,
    MAX_LEVEL,
    TWIN_LOG_DEQUANT,
    integer_weight,
    levels,
    mantissas,
    random_exponents,
    table,
    validate_exponents,
)

int8 = st.integers(-128, 127)


def shift_by_definition(mantissa, amount):
    if amount >= 0:
        return mantissa << amount
    return (mantissa + (1 << (-amount - 1))) >> -amount


def level_by_definition(base, step, offset, q, fraction_bits, integer_bits):
    v = base + step * q
    mantissa = round(2 ** ((v % (1 << fraction_bits)) / (1 << fraction_bits) + integer_bits))
    return shift_by_definition(mantissa, (v >> fraction_bits) - integer_bits) - offset


@given(int8, int8, int8, st.integers(0, MAX_FRACTION_BITS), st.integers(0, MAX_INTEGER_BITS))
def test_levels_follow_the_equations_for_all_exponents(base, step, offset, fraction_bits, integer_bits):
    exponents = np.array([base, step, offset], np.int8).reshape(1, 1, 1, 3).repeat(2, axis=2)
    got = levels(exponents, 4, fraction_bits, integer_bits)[0, 0, 0]
    for q, level in enumerate(got.tolist()):
        expected = level_by_definition(base, step, offset, q, fraction_bits, integer_bits)
        assert level == expected or (level > MAX_LEVEL and expected > MAX_LEVEL)


@pytest.mark.parametrize("fraction_bits", range(MAX_FRACTION_BITS + 1))
def test_mantissas_are_far_enough_from_ties_for_float32(fraction_bits):
    """The body computes 2^x in float32: no mantissa may lie where a few units in the last place change its rounding."""
    steps = np.arange(1 << fraction_bits)
    for integer_bits in range(MAX_INTEGER_BITS + 1):
        exact = np.exp2(steps / (1 << fraction_bits) + integer_bits)
        assert np.abs(exact - np.floor(exact) - 0.5).min() > 8 * np.spacing(np.float32(exact.max()))
        np.testing.assert_array_equal(mantissas(fraction_bits, integer_bits), np.floor(exact + 0.5))


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4]), st.integers(0, 7), st.integers(0, 8))
def test_valid_exponents_decode_alike_in_the_table_and_code_by_code(seed, bits, fraction_bits, integer_bits):
    rng = np.random.default_rng(seed)
    exponents = rng.integers(-128, 128, (200, 1, 2, 3)).astype(np.int8)
    magnitude = levels(exponents, bits, fraction_bits, integer_bits)
    ok = ((magnitude >= 0) & (magnitude <= 127)).all((1, 2, 3)) & (exponents[..., 1] >= 0).all((1, 2))
    exponents = exponents[ok]
    validate_exponents(exponents, bits, fraction_bits, integer_bits)
    every_code = np.tile(np.arange(1 << bits), (len(exponents), 1))
    if len(exponents) == 0:
        return
    weight = integer_weight(
        packing.elements(packing.pack(every_code, bits)), exponents,
        bits=bits, group_size=1 << bits, cols=1 << bits, fraction_bits=fraction_bits, integer_bits=integer_bits,
    )  # fmt: skip
    np.testing.assert_array_equal(weight, table(exponents, bits, fraction_bits, integer_bits)[:, 0])


@pytest.mark.parametrize(("fraction_bits", "integer_bits"), [(0, 0), (2, 5), (4, 6), (7, 8)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_body_is_exact_for_every_kind_of_valid_exponents(bits, fraction_bits, integer_bits, run_body):
    rng = np.random.default_rng(bits)
    exponents = rng.integers(-128, 128, (200_000, 1, 2, 3)).astype(np.int8)
    exponents[..., 1] = exponents[..., 1] % 24
    magnitude = levels(exponents, bits, fraction_bits, integer_bits)
    exponents = exponents[((magnitude >= 0) & (magnitude <= 127)).all((1, 2, 3))][:64]
    assert len(exponents) > 5
    cols = 1 << bits
    codes = packing.typed_elements(packing.pack(np.tile(np.arange(cols), (len(exponents), 1)), bits))
    attributes = {
        "bits": bits, "group_size": cols, "rows": len(exponents), "cols": cols,
        "fraction_bits": fraction_bits, "integer_bits": integer_bits,
    }  # fmt: skip
    example = Example((codes, exponents, np.ones(len(exponents), np.float32)), attributes)
    expected = TWIN_LOG_DEQUANT.reference(*example.inputs, **attributes)
    np.testing.assert_array_equal(run_body(TWIN_LOG_DEQUANT, example), expected)


def test_the_example_of_the_design():
    """v = 40, 50, 60, 70 with F = 4, I = 6: 2^2.5 = 5.66, 2^3.125 = 8.72, 2^3.75 = 13.45, 2^4.375 = 20.75.

    13.45 becomes 14: M = round(2^6.75) = 108, and 108 >> 3 is 13.5, which rounds up. Twice rounded is the definition.
    """
    exponents = np.array([[40, 10, 0], [40, 10, 2]], np.int8).reshape(1, 1, 2, 3)
    assert table(exponents, 3, 4, 6)[0, 0].tolist() == [6, 9, 14, 21, -4, -7, -12, -19]


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ([120, 8, 0], "row 1, group 0, negative side .base 120, step 8, offset 0. give levels .*needed step >= 0"),
        ([40, -1, 0], "base 40, step -1"),
        ([0, 0, 2], r"give levels \[-1, -1"),
    ],
)
def test_invalid_exponents_are_named(side, message):
    exponents = random_exponents(np.random.default_rng(0), 3, 1, 4)
    exponents[1, 0, 1] = side
    with pytest.raises(ValueError, match=message):
        validate_exponents(exponents, 4, 4, 6)


def test_exponents_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"exponents are int8\[2, 3\], needed int8\[rows, groups, 2, 3\]"):
        validate_exponents(np.zeros((2, 3), np.int8), 4, 4, 6)
    with pytest.raises(ValueError, match="fraction_bits 8 and integer_bits 6"):
        mantissas(8, 6)
