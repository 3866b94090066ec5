"""The level sets that torch searches are those that the ONNX op decodes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphs.ops import twin_log_dequant
from lrq_export.quant.level_sets import FRACTION_BITS, INTEGER_BITS, searched_sets, valid_sets
from lrq_export.quant.twin_log import level_table

BITS = pytest.mark.parametrize("bits", [2, 3, 4])


def reference(exponents: np.ndarray, bits: int) -> np.ndarray:
    return twin_log_dequant.levels(exponents, bits, FRACTION_BITS, INTEGER_BITS)


@given(st.sampled_from([2, 3, 4]), arrays(np.int8, (3, 2, 2, 3)))
@settings(deadline=None)
def test_any_exponents_decode_as_the_op_decodes_them(bits, exponents):
    table = level_table(torch.from_numpy(exponents), bits)
    assert table.dtype == torch.int16
    np.testing.assert_array_equal(table.numpy(), reference(exponents, bits))


@BITS
def test_every_listed_set_is_valid_distinct_and_what_the_op_decodes(bits):
    for sets in (valid_sets(bits), searched_sets(bits)):
        exponents = sets.exponents.numpy().reshape(-1, 1, 1, 3).repeat(2, axis=2)
        twin_log_dequant.validate_exponents(exponents, bits, FRACTION_BITS, INTEGER_BITS)
        np.testing.assert_array_equal(sets.levels.numpy(), reference(exponents, bits)[:, 0, 0])
        assert len(np.unique(sets.levels.numpy(), axis=0)) == len(sets.levels)


@BITS
def test_no_valid_set_is_missing(bits):
    rng = np.random.default_rng(bits)
    exponents = np.stack(
        [rng.integers(-128, 128, 200_000), rng.integers(0, 128, 200_000), rng.integers(-127, 128, 200_000)]
    )
    exponents = exponents.T.astype(np.int8)
    levels = reference(exponents, bits)
    found = levels[(levels >= 0).all(1) & (levels <= 127).all(1)]
    assert len(found) > 500
    listed = {tuple(levels) for levels in valid_sets(bits).levels.tolist()}
    assert {tuple(levels) for levels in found.tolist()} <= listed


@BITS
def test_the_first_set_is_all_zeros(bits):
    assert searched_sets(bits).levels[0].tolist() == [0] * 2 ** (bits - 1)
