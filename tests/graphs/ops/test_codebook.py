"""The free table of CodebookDequant: numpy, torch and the body read it alike, and a change shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.ops import OPS, packing
from graphs.ops.codebook_dequant import CODEBOOK_DEQUANT, integer_weight, random_table, validate_table
from graphs.ops.spec import Example
from lrq_export.quant.codebook_weight import CodebookWeight

DEQUANT, LINEAR = OPS["CodebookDequant"], OPS["CodebookLinear"]


def any_example(bits, rows, groups, size, seed):
    """Codes (rows, cols), and the example that holds them: any table, not ascending, its values not all different."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, groups * size)).astype(np.uint8)
    table = rng.integers(-127, 128, (rows, groups, 1 << bits)).astype(np.int8)
    scale = rng.uniform(1e-3, 1e2, rows).astype(np.float32)
    packed = packing.typed_elements(packing.pack(codes, bits))
    attributes = {"bits": bits, "group_size": size, "rows": rows, "cols": groups * size}
    return codes, Example((packed, table, scale), attributes)


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]), rows=st.integers(1, 4), groups=st.integers(1, 3), size=st.integers(1, 11),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_reference_is_the_look_up_that_torch_does(bits, rows, groups, size, seed):
    codes, example = any_example(bits, rows, groups, size, seed)
    _, table, scale = (torch.from_numpy(array) for array in (codes, *example.inputs[1:]))
    in_torch = CodebookWeight(torch.from_numpy(codes), table).dequantize().float() * scale[:, None]
    np.testing.assert_array_equal(DEQUANT.reference(*example.inputs, **example.attributes), in_torch.numpy())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_body_decodes_any_table_bit_for_bit(bits, seed, run_body):
    _, example = any_example(bits, rows=3 + seed, groups=1 + seed, size=8, seed=seed)
    expected = DEQUANT.reference(*example.inputs, **example.attributes)
    np.testing.assert_array_equal(run_body(DEQUANT, example), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_perturbed_table_entry_changes_exactly_the_weights_that_read_it(bits, run_body):
    codes, example = any_example(bits, rows=4, groups=2, size=24, seed=bits)
    packed, table, scale = example.inputs
    row, group = 2, 1
    code = codes[row, group * 24]
    changed = table.copy()
    changed[row, group, code] ^= 1
    got = run_body(DEQUANT, Example((packed, changed, scale), example.attributes))
    reads = np.zeros(codes.shape, bool)
    reads[row, group * 24 :] = codes[row, group * 24 :] == code
    assert reads.any()
    np.testing.assert_array_equal(got != DEQUANT.reference(*example.inputs, **example.attributes), reads)


def test_a_perturbed_table_entry_of_the_linear_is_beyond_its_tolerance(run_body):
    for example in LINEAR.examples(np.random.default_rng(0)):
        x, codes, table, scale, bias = example.inputs
        bits, cols = example.attributes["bits"], example.attributes["cols"]
        changed = table.copy()
        changed[0, 0, packing.unpack_elements(codes, bits, cols)[0, 0]] ^= 1
        expected = LINEAR.reference(*example.inputs, **example.attributes)
        got = run_body(LINEAR, Example((x, codes, changed, scale, bias), example.attributes))
        assert float(((got - expected) ** 2).sum() / (expected**2).sum()) > LINEAR.tolerance.nmse["float"]


def test_the_linear_multiplies_with_the_integers_of_the_dequant():
    """y = x_int w^T: with tokens that quantize to themselves and scales of one, plain integers."""
    _, example = any_example(4, rows=5, groups=2, size=8, seed=0)
    packed, table, _ = example.inputs
    rng = np.random.default_rng(1)
    x = rng.integers(-127, 128, (3, 16)).astype(np.float32)
    x[:, 0] = 127
    ones, zeros = np.ones(5, np.float32), np.zeros(5, np.float32)
    weight = DEQUANT.reference(packed, table, ones, **example.attributes)
    got = LINEAR.reference(x, packed, table, ones, zeros, **example.attributes, act_bits=8)
    np.testing.assert_array_equal(got, x @ weight.T)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.full((2, 1, 16), -128, np.int8), r"row 0, group 0 has -128 at code 0, needed -127\.\.127"),
        (np.zeros((2, 1, 8), np.int8), r"table is int8\[2, 1, 8\], needed int8\[rows, groups, 16\]"),
        (np.zeros((2, 16), np.int8), r"table is int8\[2, 16\], needed"),
        (np.zeros((2, 1, 16), np.int16), r"table is int16"),
    ],
)
def test_a_table_that_is_none_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        validate_table(table, 4)


def test_a_table_of_other_groups_is_refused():
    codes = packing.typed_elements(packing.pack(np.zeros((2, 24), np.uint8), 4))
    table = random_table(np.random.default_rng(0), 2, 2, 4)
    with pytest.raises(ValueError, match="2 rows and 2 groups do not fit 2 rows of 24 columns in groups of 8"):
        integer_weight(codes, table, bits=4, group_size=8, cols=24)


def test_shapes_that_do_not_fit_name_the_axis():
    attributes = CODEBOOK_DEQUANT.node_attributes(bits=3, group_size=12, rows=4, cols=24)
    for shape, axis in (((4, 2, 16), "axis 2 of table is 16, needed 8"), ((4, 1, 8), "axis 1 of table is 1, needed 2")):
        with pytest.raises(ValueError, match=axis):
            CODEBOOK_DEQUANT.infer_shape([(4, 3, 3), shape, (4,)], attributes)
    assert CODEBOOK_DEQUANT.infer_shape([(4, 3, 3), (4, 2, 8), None], attributes) == ((4, 24),)
