"""Every op of the dialect, computed by plugins/core: a new op has no function here, and so fails until it has one."""

import ctypes

import numpy as np
import pytest
from core_library import (
    BAD_BITS,
    BAD_SIZE,
    NULL_POINTER,
    OK,
    PROLOGUES,
    Product,
    TokenRotation,
    address,
    call,
    int8_weight,
    packed_weight,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphs import names
from graphs.ops import OPS, packing
from graphs.ops.token_product import quantize_tokens

pytestmark = pytest.mark.usefixtures("no_undefined_behaviour")


def rotate(core, name, inputs, attributes):
    x, *modulation, signs = inputs
    channels = signs.size
    y = np.empty((*x.shape[:-1], channels), np.float32)
    scale, shift = [np.broadcast_to(rows, y.shape).copy() for rows in modulation] or (None, None)
    rotation = TokenRotation(
        address(x), address(scale), address(shift), address(signs), y.size // channels, channels,
        attributes["block"], PROLOGUES[name], attributes.get("epsilon", 0.0),
    )  # fmt: skip
    call(core, "lrqRotateTokens", ctypes.byref(rotation), address(y))
    return y


def integers(core, stored, attributes, layout):
    """w (rows, cols) int8 from the stored inputs of a weight, a word at a time."""
    if len(stored) == 1:
        return int8_weight(stored[0]).decode(core, "lrqDecodeByWords")
    codes, levels = stored
    bits, cols, group_size = (attributes[key] for key in ("bits", "cols", "group_size"))
    codes = packing.unpack_elements(codes, bits, cols)
    return packed_weight(codes, levels, bits=bits, group_size=group_size, layout=layout).decode(
        core, "lrqDecodeByWords"
    )


def quantize(core, x, act_bits):
    codes, scales = np.empty(x.shape, np.int8), np.empty((*x.shape[:-1], 1), np.float32)
    cols = x.shape[-1]
    call(core, "lrqQuantizeTokens", address(x), x.size // cols, cols, act_bits, address(codes), address(scales))
    return codes, scales


def dequantize(core, name, inputs, attributes, layout=names.STORAGE):
    *stored, scale = inputs
    return integers(core, stored, attributes, layout).astype(np.float32) * scale[:, None]


def linear(core, name, inputs, attributes, layout=names.STORAGE):
    x, *stored = inputs[: 4 if name.startswith("Int8") else 5]
    *stored, scale, bias = stored
    epilogue = inputs[4 if name.startswith("Int8") else 5 :]
    weight = integers(core, stored, attributes, layout)
    rows, cols = weight.shape
    if attributes.get("rotation", "none") != "none":
        x = rotate(core, "HadamardRotate", (x, np.ones(cols, np.float32)), attributes)
    codes, scales = quantize(core, x, attributes["act_bits"])
    y = np.empty((*x.shape[:-1], rows), np.float32)
    gate, residual = [np.broadcast_to(each, y.shape).copy() for each in epilogue] or (None, None)
    product = Product(
        address(codes), address(scales), address(weight), address(scale), address(bias), address(gate),
        address(residual), y.size // rows, rows, cols,
    )  # fmt: skip
    call(core, "lrqTokenProduct", ctypes.byref(product), address(y))
    return y


ENDINGS = {"Rotate": rotate, "Dequant": dequantize, "Linear": linear, "LinearResidual": linear}


def function_of(name):
    return next(function for ending, function in ENDINGS.items() if name.endswith(ending))


def nmse(got, expected):
    return np.square(got - expected, dtype=np.float64).sum() / np.square(expected, dtype=np.float64).sum()


def assert_parity(name, got, expected):
    assert got.shape == expected.shape
    if function_of(name) is rotate:  # sums in another order
        assert nmse(got, expected) <= OPS[name].tolerance.nmse["float"]
    else:  # all of it is defined, to the last bit
        np.testing.assert_array_equal(got, expected)


EXAMPLES = [
    pytest.param(name, example, id=f"{name}-{index}")
    for name, spec in OPS.items()
    for index, example in enumerate(spec.examples(np.random.default_rng(0)))
]


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_every_op_is_computed_as_its_reference_says(core, name, example):
    got = function_of(name)(core, name, example.inputs, example.attributes)
    assert_parity(name, got, OPS[name].reference(*example.inputs, **example.attributes))


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_perturbed_numbers_of_any_input_are_seen(core, name, example):
    expected = OPS[name].reference(*example.inputs, **example.attributes)
    for index, tensor in enumerate(OPS[name].inputs):
        if tensor.name in ("exponents", "table"):
            continue  # a level that no code uses does not show; test_core.py perturbs whole groups
        inputs = [array.copy() for array in example.inputs]
        perturb(inputs[index].reshape(-1))
        got = function_of(name)(core, name, inputs, example.attributes)
        with pytest.raises(AssertionError):
            assert_parity(name, got, expected)


def perturb(flat):
    if flat.dtype == np.float32:
        flat[:8] = 1 - flat[:8]  # not one alone: an activation far below zero does not show
    else:
        flat[0] = (flat[0].astype(np.int8) ^ 1).astype(flat.dtype)


FAR = np.float32([np.inf, 3e38, 1e20, 300, 89, 20, 9, 5.5, 3, 1, 1e-3, 1e-38, 1e-45, 0])


@pytest.mark.parametrize("name", [name for name in OPS if name.endswith(("luRotate", "luTanhRotate"))])
def test_activations_are_those_of_the_reference_as_far_as_floats_go(core, name):
    x = np.concatenate([-FAR, FAR, np.float32([np.nan])])[:, None]
    if name == "GegluRotate":
        x = np.concatenate([np.ones_like(x), x], axis=1)
    inputs, attributes = (x, np.ones(1, np.float32)), {"block": 1, "base": 1, "order": 0}
    with np.errstate(all="ignore"):
        expected = OPS[name].reference(*inputs, **attributes)
    # erfc(t) changes by 2 t^2 eps where t is rounded: 1e-5 at -9, and below -13 the result is denormal
    got = rotate(core, name, inputs, attributes)
    np.testing.assert_allclose(got, expected, rtol=3e-5, atol=1e-36, equal_nan=True)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got + np.float32(1e-4), expected, rtol=3e-5, atol=1e-36, equal_nan=True)


LINEARS = [name for name in OPS if function_of(name) is linear]


@pytest.mark.parametrize("name", LINEARS)
def test_linear_ops_read_words_and_rotate_as_their_reference_says(core, name):
    example = OPS[name].examples(np.random.default_rng(3))[0]
    attributes = {**example.attributes, "rotation": "hadamard", "block": 1 if example.attributes["cols"] % 2 else 2}
    got = linear(core, name, example.inputs, attributes, names.STORAGE if name.startswith("Int8") else names.WORDS)
    expected = OPS[name].reference(*example.inputs, **attributes)
    assert nmse(got, expected) < 1e-12
    assert nmse(linear(core, name, example.inputs, example.attributes), expected) > 1e-12 or attributes["block"] == 1


@given(
    tokens=st.integers(1, 4),
    cols=st.integers(1, 70),
    act_bits=st.sampled_from((8, 6, 4)),
    exponent=st.integers(-44, 37),
    seed=st.integers(0, 2**32 - 1),
)
@example(tokens=2, cols=1, act_bits=8, exponent=-42, seed=0)  # the smallest scale that float32 has
@settings(deadline=None, max_examples=80)
def test_any_tokens_are_quantized_as_the_reference_does(core, tokens, cols, act_bits, exponent, seed):
    rng = np.random.default_rng(seed)
    with np.errstate(under="ignore"):
        x = (rng.standard_normal((tokens, cols)) * 10.0**exponent).astype(np.float32)
    x[0] = 0
    codes, scales = quantize(core, x, act_bits)
    expected, expected_scales = quantize_tokens(x, act_bits)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(scales, expected_scales)
    if np.abs(x).max() > 0:
        other = x * np.float32(256 if exponent < 0 else 0.5)  # by 2, the smallest scales would round to the same one
        assert (quantize(core, other, act_bits)[1] != expected_scales).any()


def test_tokens_that_are_not_finite_or_formats_that_do_not_exist_are_defined(core):
    x = np.array([[np.nan, 1, np.inf, -np.inf], [np.nan] * 4], np.float32)
    codes, scales = quantize(core, x, 8)
    assert np.abs(codes.astype(int)).max() <= 127
    at = [address(array) for array in (x, codes, scales)]
    assert core.lrqQuantizeTokens(at[0], 2, 4, 7, *at[1:]) == BAD_BITS
    assert core.lrqQuantizeTokens(at[0], 2, -4, 8, *at[1:]) == BAD_SIZE
    assert core.lrqQuantizeTokens(None, 2, 4, 8, *at[1:]) == NULL_POINTER


def test_a_product_whose_sum_could_overflow_is_refused(core):
    codes = np.full((1, 131071), -128, np.int8)
    one, y = np.ones((1, 1), np.float32), np.full((1, 1), np.nan, np.float32)
    at, of_ones = address(codes), address(one)
    fields = {
        "activations": at, "token_scales": of_ones, "weight": at, "row_scales": of_ones, "bias": of_ones,
        "tokens": 1, "rows": 1, "cols": 131071,
    }  # fmt: skip
    assert core.lrqTokenProduct(ctypes.byref(Product(**fields)), address(y)) == OK
    assert y == np.float32(131071 * 128 * 128) + np.float32(1)
    for changes, status in (
        ({"cols": 131072}, BAD_SIZE), ({"cols": 0}, BAD_SIZE), ({"rows": -1}, BAD_SIZE), ({"tokens": 2**62}, BAD_SIZE),
        ({"bias": None}, NULL_POINTER), ({"gate": of_ones}, NULL_POINTER), ({"residual": of_ones}, NULL_POINTER),
    ):  # fmt: skip
        assert core.lrqTokenProduct(ctypes.byref(Product(**fields | changes)), address(y)) == status
