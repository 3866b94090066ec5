"""TwinLogDequant: W (rows, cols) from packed twin-log codes, by shifts and adds only.

A b-bit code is a sign bit (most significant) and a magnitude index q of b - 1 bits. For each (row, group, sign) three
small integers base, step, offset are stored. With F = fraction_bits and I = integer_bits (equations
(7)-(10) of the LRQ-DiT paper with its log offset, made exactly representable):

    v = base + step q                                            exponent in units of 2^-F
    f = v >> F,  r = v & (2^F - 1)
    m = SHIFT(M[r], f - I) - offset,  M[r] = round(2^(r / 2^F + I))     right shifts round half up
    w = +-m with 0 <= m <= 127,  W = scale[row] w

Every step is exact in integers, and the body does the same in integer-valued float32, so torch, numpy, ONNX, C++ and
CUDA agree bit for bit. Groups share the scale of their row: one INT8 product serves grouped weights too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphs import names
from graphs.ops import coded_weight
from graphs.ops.coded_weight import MAX_LEVEL
from graphs.ops.spec import Attribute, AttributeValue, Example, Shape, Tensor
from graphs.ops.weight_format import WeightFormat, dequant_op

MAX_FRACTION_BITS = 7
MAX_INTEGER_BITS = 8
MAX_LEFT_SHIFT = 8  # M >= 1, so a shift by 8 is beyond MAX_LEVEL + the largest offset, and so is any larger one


def mantissas(fraction_bits: int, integer_bits: int) -> np.ndarray:
    """M[r] = round(2^(r / 2^F + I)), (2^F,) int32. Raises ValueError for F outside 0..7 or I outside 0..8."""
    if not 0 <= fraction_bits <= MAX_FRACTION_BITS or not 0 <= integer_bits <= MAX_INTEGER_BITS:
        raise ValueError(
            f"fraction_bits {fraction_bits} and integer_bits {integer_bits}: "
            f"needed 0..{MAX_FRACTION_BITS} and 0..{MAX_INTEGER_BITS}"
        )
    steps = 1 << fraction_bits
    return np.rint(np.exp2(np.arange(steps) / steps + integer_bits)).astype(np.int32)


def levels(
    exponents: np.ndarray, bits: int, fraction_bits: int = names.FRACTION_BITS, integer_bits: int = names.INTEGER_BITS
) -> np.ndarray:
    """The magnitudes m[..., q] int32 of shape (rows, groups, 2, 2^(bits-1)) from exponents (rows, groups, 2, 3) int8.

    Shifts are limited to what can matter, so any exponents give a defined result; only those that
    `validate_exponents` accepts are weights.
    """
    base, step, offset = (exponents[..., i, None].astype(np.int32) for i in range(3))
    exponent = base + step * np.arange(1 << (bits - 1), dtype=np.int32)
    mantissa = mantissas(fraction_bits, integer_bits)[exponent & ((1 << fraction_bits) - 1)]
    shift = (exponent >> fraction_bits) - integer_bits
    left = np.clip(shift, 0, MAX_LEFT_SHIFT)
    right = np.clip(-shift, 0, integer_bits + 3)  # M <= 2^(I+1): from there on every shift gives 0
    half = (1 << right) >> 1
    return (((mantissa << left) + half) >> right) - offset


def table(
    exponents: np.ndarray, bits: int, fraction_bits: int = names.FRACTION_BITS, integer_bits: int = names.INTEGER_BITS
) -> np.ndarray:
    """The signed value of every code, (rows, groups, 2^bits) int32: the lower half positive, the upper negative."""
    magnitude = levels(exponents, bits, fraction_bits, integer_bits)
    return np.concatenate([magnitude[:, :, 0], -magnitude[:, :, 1]], axis=-1)


def validate_exponents(exponents: np.ndarray, bits: int, fraction_bits: int, integer_bits: int) -> None:
    """Raise ValueError unless exponents are (rows, groups, 2, 3) int8 with step >= 0 and every level in 0..127."""
    if exponents.dtype != np.int8 or exponents.ndim != 4 or exponents.shape[2:] != (2, 3):
        raise ValueError(f"exponents are {exponents.dtype}{list(exponents.shape)}, needed int8[rows, groups, 2, 3]")
    magnitude = levels(exponents, bits, fraction_bits, integer_bits)
    bad = (exponents[..., 1] < 0) | (magnitude < 0).any(-1) | (magnitude > MAX_LEVEL).any(-1)
    if bad.any():
        row, group, sign = (int(i) for i in np.argwhere(bad)[0])
        base, step, offset = exponents[row, group, sign].tolist()
        raise ValueError(
            f"exponents of row {row}, group {group}, {'negative' if sign else 'positive'} side "
            f"(base {base}, step {step}, offset {offset}) give levels {magnitude[row, group, sign].tolist()}, "
            f"needed step >= 0 and levels in 0..{MAX_LEVEL}"
        )


def integer_weight(
    codes: np.ndarray,
    exponents: np.ndarray,
    *,
    bits: int,
    group_size: int,
    cols: int,
    fraction_bits: int = names.FRACTION_BITS,
    integer_bits: int = names.INTEGER_BITS,
    layout: str = names.STORAGE,
) -> np.ndarray:
    """The integers w (rows, cols) int8 from elements (rows, planes, elements) of int8 or int4, or words int8.

    Raises ValueError for exponents that are not valid, or shapes that do not fit together.
    """
    validate_exponents(exponents, bits, fraction_bits, integer_bits)
    values = table(exponents, bits, fraction_bits, integer_bits).astype(np.int8)
    return coded_weight.look_up(codes, values, bits=bits, group_size=group_size, cols=cols, layout=layout)


def random_exponents(rng: np.random.Generator, rows: int, groups: int, bits: int) -> np.ndarray:
    """Valid exponents (rows, groups, 2, 3) int8 for F = 4, I = 6 whose levels are all different."""
    shape = (rows, groups, 2)
    base = rng.integers(32, 48, shape)  # from 2^2 up, neighbours 6/16 of an octave apart differ after rounding
    step = rng.integers(6, (111 - base) // ((1 << (bits - 1)) - 1) + 1)  # 2^(111/16) = 122.6
    offset = rng.integers(-4, 5, shape)  # the lowest level is at least 4
    return np.stack([base, step, offset], axis=-1).astype(np.int8)


def _check_shapes(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> None:
    codes, exponents = shapes
    mantissas(attributes["fraction_bits"], attributes["integer_bits"])
    coded_weight.check_coded_shapes(codes, exponents, attributes, name="exponents", of_a_group=(2, 3))


def _example(rng: np.random.Generator, bits: int, rows: int, cols: int, group_size: int) -> Example:
    exponents = random_exponents(rng, rows, cols // group_size, bits)
    return coded_weight.coded_example(rng, exponents, bits, rows, cols, group_size)


# Powers of two come from a list, not from Pow, which is inexact on some devices; only M is rounded and so may use it.
_SHIFTS = ", ".join(repr(2.0**shift) for shift in range(-MAX_INTEGER_BITS - 3, MAX_LEFT_SHIFT + 1))

# Reads exponents and what `CODES_BODY` gives; gives `level_table` (rows, groups, 2^bits) float.
_TABLE_BODY = f"""
    exponent = DequantizeLinear(exponents, one)
    half = Constant<value_float = 0.5>()
    n_fraction = Constant<value_int: int = @fraction_bits>()
    n_integer = Constant<value_int: int = @integer_bits>()

    # levels (rows, groups, 2, 2^(bits - 1)): v = base + step q, M[r] shifted by f - I, minus the offset
    base, step, offset = Split<axis = 3, num_outputs = 3>(exponent)
    magnitude_bits = Sub(n_bits, one_i)
    magnitude_count_f = Gather(powers, magnitude_bits)
    magnitude_count = Cast<to = 7>(magnitude_count_f)
    q_i = Range(zero, magnitude_count, one_i)
    q = Cast<to = 1>(q_i)
    climb = Mul(step, q)
    v = Add(base, climb)
    unit = Gather(powers, n_fraction)
    v_octaves = Div(v, unit)
    f = Floor(v_octaves)
    f_low = Mul(f, unit)
    r = Sub(v, f_low)
    unit_i = Cast<to = 7>(unit)
    fraction_i = Range(zero, unit_i, one_i)
    fraction = Cast<to = 1>(fraction_i)
    fraction_octaves = Div(fraction, unit)
    integer_f = Cast<to = 1>(n_integer)
    mantissa_log = Add(fraction_octaves, integer_f)
    two = Constant<value_float = 2.0>()
    mantissa_exact = Pow(two, mantissa_log)
    mantissas = Round(mantissa_exact)
    r_i = Cast<to = 7>(r)
    mantissa = Gather(mantissas, r_i)
    shift = Sub(f, integer_f)
    lowest = Constant<value_float = {-MAX_INTEGER_BITS - 3}.0>()
    highest = Constant<value_float = {MAX_LEFT_SHIFT}.0>()
    shift_bounded = Clip(shift, lowest, highest)
    shift_from_zero = Sub(shift_bounded, lowest)
    shift_i = Cast<to = 7>(shift_from_zero)
    shift_powers = Constant<value_floats = [{_SHIFTS}]>()
    shift_power = Gather(shift_powers, shift_i)
    product = Mul(mantissa, shift_power)
    product_up = Add(product, half)
    shifted = Floor(product_up)
    level = Sub(shifted, offset)

    # level_table (rows, groups, 2^bits): the positive side, then the negated negative side
    side_sign = Constant<value_floats = [1.0, -1.0]>()
    to_sides = Constant<value_ints = [2, 1]>()
    side_column = Reshape(side_sign, to_sides)
    signed_level = Mul(level, side_column)
    table_shape = Constant<value_ints = [0, 0, -1]>()
    level_table = Reshape(signed_level, table_shape)
"""

TWIN_LOG = WeightFormat(
    stored=(coded_weight.CODES, Tensor("exponents", "int8", "(rows, groups, 2, 3): sign +, -; base, step, offset")),
    attributes=(
        *coded_weight.CODE_ATTRIBUTES,
        Attribute("fraction_bits", int, "F: exponents are in units of 2^-F", names.FRACTION_BITS),
        Attribute("integer_bits", int, "I: mantissas carry I bits before they are shifted", names.INTEGER_BITS),
    ),
    product_attributes=(coded_weight.LAYOUT,),
    type_vars=coded_weight.TYPE_VARS,
    integer_weight=integer_weight,
    body=f"{coded_weight.CODES_BODY}{_TABLE_BODY}{coded_weight.LOOK_UP_BODY}",
    check_shapes=_check_shapes,
    example=_example,
)

TWIN_LOG_DEQUANT = dequant_op(
    "TwinLogDequant",
    "W (rows, cols) from packed twin-log codes: shifts, adds and one scale per row.",
    TWIN_LOG,
    coded_weight.DEQUANT_CASES,
)
