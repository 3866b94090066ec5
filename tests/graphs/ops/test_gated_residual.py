"""A linear op that adds its result to a residual: the same product, gated, and rounded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs.ops import OPS
from graphs.ops.spec import Example

FORMATS = ("TwinLog", "Codebook", "Int8")


def examples(name):
    return OPS[f"{name}LinearResidual"].examples(np.random.default_rng(0))


def reference(op, inputs, attributes):
    return OPS[op].reference(*inputs, **OPS[op].node_attributes(**attributes))


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_the_plain_linear_gated_and_added(name):
    for example in examples(name):
        *of_product, gate, residual = example.inputs
        product = reference(f"{name}Linear", of_product, example.attributes)
        got = reference(f"{name}LinearResidual", example.inputs, example.attributes)
        np.testing.assert_array_equal(got, residual + gate * product)


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_torch_s_linear_on_tokens_that_quantize_to_themselves(name):
    for example in examples(name):
        x, *of_weight, bias, gate, residual = example.inputs
        limit = 2 ** (example.attributes["act_bits"] - 1) - 1
        x = np.random.default_rng(1).integers(-limit, limit + 1, x.shape).astype(np.float32)
        x[..., 0] = limit
        got = reference(f"{name}LinearResidual", (x, *of_weight, bias, gate, residual), example.attributes)
        sizes = {key: value for key, value in example.attributes.items() if key != "act_bits"}
        weight = reference(f"{name}Dequant", of_weight, sizes)
        tensors = (torch.from_numpy(array).double() for array in (x, weight, bias, gate, residual))
        x, weight, bias, gate, residual = tensors
        expected = residual + gate * torch.nn.functional.linear(x, weight, bias)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_the_sum_is_rounded_once(name, cast, run_body):
    spec = OPS[f"{name}LinearResidual"]
    half = cast(spec, examples(name)[0], "float16")
    exact = reference(spec.name, cast(spec, half, "float").inputs, half.attributes)
    *of_product, gate, residual = half.inputs
    twice = residual + gate * reference(f"{name}Linear", of_product, half.attributes)
    assert (exact.astype(np.float16) != twice).any()
    np.testing.assert_array_equal(reference(spec.name, half.inputs, half.attributes), exact.astype(np.float16))
    np.testing.assert_array_equal(run_body(spec, half), exact.astype(np.float16))


@pytest.mark.parametrize("name", FORMATS)
def test_a_gate_of_zero_gives_the_residual(name, run_body):
    for example in examples(name):
        *of_product, gate, residual = example.inputs
        closed = Example((*of_product, np.zeros_like(gate), residual), example.attributes)
        np.testing.assert_array_equal(run_body(OPS[f"{name}LinearResidual"], closed), residual)


@pytest.mark.parametrize("changed", ["codes", "scale", "bias", "gate", "residual"])
@pytest.mark.parametrize("name", FORMATS)
def test_one_changed_entry_is_beyond_the_tolerance(name, changed, run_body):
    spec = OPS[f"{name}LinearResidual"]
    for example in examples(name):
        inputs = [array.copy() for array in example.inputs]
        index = [tensor.name for tensor in spec.inputs].index(changed)
        first = inputs[index].flat[0]
        inputs[index].flat[0] = int(first) ^ 1 if changed == "codes" else -first
        got = run_body(spec, Example(tuple(inputs), example.attributes))
        expected = reference(spec.name, example.inputs, example.attributes)
        assert ((got - expected) ** 2).sum() / (expected**2).sum() > spec.tolerance.nmse["float16"]


@pytest.mark.parametrize(
    ("gate", "residual", "message"),
    [
        ((7,), (2, 1, 6), "the last axis of gate is 7, needed 6"),
        ((2, 1, 1), (2, 1, 6), "the last axis of gate is 1, needed 6"),
        ((3, 1, 6), (2, 1, 6), "axis 0 of gate, which broadcasts to y, is 3, needed 2"),
        ((5, 6), (2, 1, 6), "axis 0 of gate, which broadcasts to y, is 5, needed 1"),
        ((1, 2, 1, 6), (2, 1, 6), r"gate has 4 axes, needed 1\.\.3, no more than y has"),
        ((6,), (2, 1, 8), "axis 2 of residual is 8, needed 6"),
        ((6,), (2, 4, 6), "axis 1 of residual is 4, needed 1"),
        ((6,), (1, 1, 6), "axis 0 of residual is 1, needed 2"),
        ((6,), (6,), "residual has 1 axes, needed 3"),
    ],
)
def test_a_gate_or_residual_that_is_not_like_y_is_refused(gate, residual, message):
    spec = OPS["Int8LinearResidual"]
    shapes = [(2, 1, 8), (6, 8), (6,), (6,), gate, residual]
    attributes = spec.node_attributes(rows=6, cols=8, act_bits=8)
    with pytest.raises(ValueError, match=message):
        spec.infer_shape(shapes, attributes)
    inputs = [np.ones(shape, np.int8 if shape == (6, 8) else np.float32) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        spec.reference(*inputs, **attributes)


def test_sizes_that_are_not_known_are_not_refused():
    spec = OPS["Int8LinearResidual"]
    attributes = spec.node_attributes(rows=6, cols=8, act_bits=8)
    x, y = ("batch", "tokens", 8), ("batch", "tokens", 6)
    for gate, residual in ((("batch", 1, 6), y), ((6,), (2, None, 6)), (None, None)):
        assert spec.infer_shape([x, (6, 8), (6,), (6,), gate, residual], attributes) == (y,)
    assert spec.infer_shape([None, (6, 8), (6,), (6,), (6,), y], attributes) == (None,)
