"""Normalizations and activations in front of a rotation: what torch computes, times a whole Hadamard matrix."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU

from graphs.ops import OPS
from graphs.ops.hadamard import hadamard_matrix
from graphs.ops.rotated import rotation_attributes
from graphs.ops.spec import Example


def norm(function, x, scale, shift, epsilon):
    return function(x, x.shape[-1:], eps=epsilon) * scale + shift


def geglu(x):
    module = GEGLU(1, 1)
    module.proj = torch.nn.Identity()
    return module(x)


IN_TORCH = {
    "HadamardRotate": lambda x: x,
    "LayerNormRotate": partial(norm, F.layer_norm),
    "RMSNormRotate": partial(norm, F.rms_norm),
    "GeluRotate": F.gelu,
    "GeluTanhRotate": partial(F.gelu, approximate="tanh"),
    "SiluRotate": F.silu,
    "GegluRotate": geglu,
}
NORMS = ("LayerNormRotate", "RMSNormRotate")
NOT_THE_SAME = {
    "LayerNormRotate": "RMSNormRotate",
    "RMSNormRotate": "LayerNormRotate",
    "GeluRotate": "GeluTanhRotate",
    "GeluTanhRotate": "GeluRotate",
    "SiluRotate": "GeluRotate",
    "HadamardRotate": "SiluRotate",
}


def examples(name):
    return OPS[name].examples(np.random.default_rng(0))


def reference(name, example):
    return OPS[name].reference(*example.inputs, **OPS[name].node_attributes(**example.attributes))


def nmse(got, expected):
    assert got.shape == expected.shape
    return float(((got - expected) ** 2).sum() / (expected**2).sum())


def expected(name, example):
    """The op by torch in float64 and one dense matrix."""
    *inputs, signs = (torch.from_numpy(array.astype(np.float64)) for array in example.inputs)
    given = {"epsilon": example.attributes["epsilon"]} if name in NORMS else {}
    tokens = IN_TORCH[name](*inputs, **given) * signs
    matrix = torch.from_numpy(hadamard_matrix(example.attributes["block"]))
    return (tokens.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2).numpy()


@pytest.mark.parametrize("name", IN_TORCH)
def test_the_reference_is_torch_and_a_matrix(name):
    for example in examples(name):
        assert nmse(reference(name, example), expected(name, example)) < 1e-12


@pytest.mark.parametrize(("name", "other"), NOT_THE_SAME.items())
def test_its_nearest_neighbour_is_beyond_the_tolerance(name, other):
    for example in examples(name):
        assert nmse(reference(name, example), expected(other, example)) > OPS[name].tolerance.nmse["float"]


def test_the_second_half_is_the_gate():
    example = examples("GegluRotate")[0]
    x, signs = example.inputs
    swapped = Example((np.roll(x, x.shape[-1] // 2, axis=-1), signs), example.attributes)
    assert nmse(reference("GegluRotate", swapped), expected("GegluRotate", example)) > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", IN_TORCH)
def test_the_result_is_rounded_once(name, dtype, cast):
    spec = OPS[name]
    half = cast(spec, examples(name)[0], dtype)
    exact = reference(name, cast(spec, half, "float"))
    rounded = exact.astype({"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype])
    np.testing.assert_array_equal(reference(name, half), rounded)


@pytest.mark.parametrize(
    ("name", "changed"),
    [(name, tensor.name) for name in IN_TORCH for tensor in OPS[name].inputs if tensor.name != "x"],
)
def test_one_flipped_parameter_is_beyond_the_tolerance(name, changed, run_body):
    spec = OPS[name]
    for example in examples(name):
        inputs = [array.copy() for array in example.inputs]
        index = [tensor.name for tensor in spec.inputs].index(changed)
        largest = np.abs(inputs[index]).argmax()  # a sign of +-1 / 256 hardly shows
        inputs[index].flat[largest] *= -1
        got = run_body(spec, Example(tuple(inputs), example.attributes))
        assert nmse(got, reference(name, example)) > spec.tolerance.nmse["float"]


@pytest.mark.parametrize("name", NORMS)
def test_the_body_reads_its_epsilon(name, run_body):
    spec, example = OPS[name], examples(name)[0]
    small = Example((example.inputs[0] * np.float32(1e-3), *example.inputs[1:]), example.attributes)
    for epsilon in (1e-6, 1e-5):
        other = Example(small.inputs, {**small.attributes, "epsilon": epsilon})
        assert nmse(run_body(spec, other), expected(name, other)) < 1e-12
        assert (nmse(run_body(spec, other), expected(name, small)) > 1e-2) == (epsilon != 1e-6)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("value", [0, -3])
def test_a_token_of_one_value_is_finite(name, value, run_body):
    spec = OPS[name]
    _, scale, shift, signs = examples(name)[0].inputs
    x = np.full((2, 3, 1152), value, np.float32)
    example = Example((x, scale, shift, signs), {**rotation_attributes(1152), "epsilon": 1e-6})
    assert nmse(run_body(spec, example), expected(name, example)) < 1e-12


@pytest.mark.parametrize("name", ["GeluRotate", "GeluTanhRotate", "SiluRotate", "GegluRotate"])
def test_an_activation_far_from_zero_is_finite(name, run_body):
    spec = OPS[name]
    values = np.float32([-6e4, -1e3, -89, -9, -1e-6, 0, 1e-30, 9, 89, 1e3, 6e4, -5])
    x = np.concatenate([values, np.roll(values, 3)]) if name == "GegluRotate" else values
    example = Example((x[None], np.ones(12, np.float32)), rotation_attributes(1))
    np.testing.assert_allclose(reference(name, example), expected(name, example), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run_body(spec, example), expected(name, example), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "shift", "message"),
    [
        ((71,), (72,), "the last axis of scale is 71, needed 72"),
        ((72,), (2, 1, 1), "the last axis of shift is 1, needed 72"),
        ((), (72,), r"scale has 0 axes, needed 1\.\.3, no more than x has"),
        ((1, 2, 1, 72), (72,), r"scale has 4 axes, needed 1\.\.3, no more than x has"),
        ((3, 1, 72), (72,), "axis 0 of scale, which broadcasts to x, is 3, needed 2"),
        ((72,), (5, 72), "axis 0 of shift, which broadcasts to x, is 5, needed 1"),
    ],
)
@pytest.mark.parametrize("name", NORMS)
def test_a_scale_or_shift_that_does_not_broadcast_to_x_is_refused(name, scale, shift, message):
    attributes = {**rotation_attributes(72), "epsilon": 1e-6}
    shapes = [(2, 1, 72), scale, shift, (72,)]
    with pytest.raises(ValueError, match=message):
        OPS[name].infer_shape(shapes, attributes)
    with pytest.raises(ValueError, match=message):
        OPS[name].reference(*(np.ones(shape, np.float32) for shape in shapes), **attributes)


@pytest.mark.parametrize("name", NORMS)
def test_sizes_that_are_not_known_are_not_refused(name):
    attributes = {**rotation_attributes(72), "epsilon": 1e-6}
    x = ("batch", "tokens", 144)
    for modulation in (("batch", 1, 144), ("batch", "tokens", 144), (2, None, "n"), (144,), None):
        assert OPS[name].infer_shape([x, modulation, modulation, ("n",)], attributes) == (x,)
    assert OPS[name].infer_shape([None, None, None, None], attributes) == (None,)


def test_an_epsilon_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"epsilon is -1\.0, needed 0 or more"):
        OPS["RMSNormRotate"].infer_shape([(1, 4), (4,), (4,), (4,)], {**rotation_attributes(4), "epsilon": -1.0})


@pytest.mark.parametrize(
    ("x", "signs", "message"),
    [
        ((3, 145), (72,), "x has 145 channels, needed a multiple of 2"),
        ((3, 72), (72,), "signs is 72, needed 36"),
        ((3, 40), (20,), "block 36 does not divide the 20 channels"),
        ((), (36,), r"x is a scalar, needed \(\.\.\., n\)"),
    ],
)
def test_geglu_needs_twice_the_channels(x, signs, message):
    with pytest.raises(ValueError, match=message):
        OPS["GegluRotate"].infer_shape([x, signs], rotation_attributes(36))


def test_geglu_halves_what_is_known_of_x():
    infer = partial(OPS["GegluRotate"].infer_shape, attributes=rotation_attributes(36))
    assert infer([("batch", 5, 144), ("n",)]) == (("batch", 5, 72),)
    assert infer([("batch", 5, "two_n"), (72,)]) == (("batch", 5, None),)
    assert infer([None, (72,)]) == (None,)
