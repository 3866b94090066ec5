"""Per-token quantization and the integer product: the corners that random inputs miss."""

from __future__ import annotations

import numpy as np
import pytest

from graphs.ops import OPS
from graphs.ops.spec import Example
from graphs.ops.token_product import quantize_tokens, token_product

RNG = np.random.default_rng(0)


def int8_linear(x, rows=4, act_bits=8):
    cols = x.shape[-1]
    codes = RNG.integers(-127, 128, (rows, cols)).astype(np.int8)
    scale = RNG.uniform(0.001, 0.01, rows).astype(np.float32)
    bias = RNG.standard_normal(rows, np.float32)
    return Example((x, codes, scale, bias), {"rows": rows, "cols": cols, "act_bits": act_bits})


@pytest.mark.parametrize("act_bits", [8, 6, 4])
def test_a_token_reaches_its_limit_and_halves_round_to_even(act_bits):
    limit = 2 ** (act_bits - 1) - 1
    codes, scale = quantize_tokens(np.array([[-limit, 0.5, 1.5, 2.5, -0.5]], np.float32), act_bits)
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[-limit, 0, 2, 2, 0]]


def test_a_token_of_zeros_gives_the_bias(run_body):
    example = int8_linear(np.zeros((1, 8), np.float32))
    np.testing.assert_array_equal(run_body(OPS["Int8Linear"], example)[0], example.inputs[3])


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e30])
def test_tiny_and_huge_tokens_are_exact(size, run_body):
    example = int8_linear((RNG.standard_normal((2, 8)) * size).astype(np.float32))
    expected = OPS["Int8Linear"].reference(*example.inputs, **example.attributes)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(run_body(OPS["Int8Linear"], example), expected)


def test_the_reference_accumulates_exactly_where_float32_does_not():
    cols = 4609
    x = np.full((1, cols), 127, np.float32)
    weight = np.full((1, cols), 127, np.int8)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    assert token_product(x, weight, one, zero, act_bits=8)[0, 0] == np.float32(127 * 127 * cols)


def test_a_fused_rotation_equals_rotating_first():
    from graphs.ops.hadamard import transform

    example = int8_linear(RNG.standard_normal((3, 24)).astype(np.float32))
    x, *parameters = example.inputs
    reference = OPS["Int8Linear"].reference
    fused = reference(x, *parameters, **example.attributes, rotation="hadamard", block=12)
    np.testing.assert_array_equal(fused, reference(transform(x, 12), *parameters, **example.attributes))
