"""plugins/core, compiled with g++ on every run, reads codes and decodes weights as numpy does, bit for bit."""

import ctypes
import itertools
from dataclasses import replace

import numpy as np
import pytest
from core_library import (
    BAD_BITS,
    BAD_FORMAT,
    BAD_GROUP,
    BAD_LEVELS,
    BAD_SIZE,
    LAYOUTS,
    NULL_POINTER,
    OK,
    address,
    int8_weight,
    packed_weight,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import names
from graphs.ops import coded_weight, packing, words
from graphs.ops.codebook_dequant import random_table
from graphs.ops.twin_log_dequant import levels, random_exponents, table

pytestmark = pytest.mark.usefixtures("no_undefined_behaviour")

SHAPES = [(6, 24, 24), (5, 32, 8), (3, 13, 13), (2, 3, 3), (2, 70, 35), (3, 66, 1)]  # rows, cols, group_size
DECODERS = ("lrqDecodeByShifts", "lrqDecodeByTable", "lrqDecodeByWords")
MAKE_LEVELS = {names.TWIN_LOG: random_exponents, names.CODEBOOK: random_table}


class Case:
    """A random weight in numpy, and as C takes it."""

    def __init__(self, bits, rows, cols, group_size, layout=names.STORAGE, form=names.TWIN_LOG, seed=0):
        rng = np.random.default_rng(seed)
        self.codes = rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
        self.levels = MAKE_LEVELS[form](rng, rows, cols // group_size, bits)
        self.weight = packed_weight(self.codes, self.levels, bits=bits, group_size=group_size, layout=layout)
        self.decoders = DECODERS[form == names.CODEBOOK :]

    def tables(self):
        """(rows, groups, 2^bits) int8"""
        if self.levels.ndim == 3:
            return self.levels
        return table(self.levels, self.weight.bits).astype(np.int8)

    def decoded(self):
        """What numpy decodes from the very bytes that C is given."""
        weight = self.weight
        if weight.layout == names.WORDS:
            stored = weight.raw.view(np.int8).reshape(words.words_shape(weight.bits, weight.rows, weight.cols))
        else:
            form = packing.layout(weight.bits)
            shape = form.shape(weight.rows, weight.cols)
            packed = packing.Packed(weight.bits, weight.cols, shape, form.onnx_type, weight.raw.tobytes())
            stored = packing.elements(packed)
        return coded_weight.look_up(
            stored, self.tables(), bits=weight.bits, group_size=weight.group_size, cols=weight.cols,
            layout=weight.layout,
        )  # fmt: skip


CASES = [
    (bits, *shape, layout, form)
    for bits, shape, layout, form in itertools.product((2, 3, 4), SHAPES, LAYOUTS, MAKE_LEVELS)
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    return Case(*request.param)


def packed(core, codes, bits, layout):
    """The codes packed in C, in an array with four guard bytes behind them."""
    count = packed_weight(codes, np.zeros((1, 1, 1), np.int8), bits=bits, group_size=1, layout=layout).raw.nbytes
    raw = np.full(count + 4, 0xA5, np.uint8)
    arguments = (*codes.shape, bits, LAYOUTS[layout], address(raw))
    assert core.lrqPackCodes(address(codes), *arguments, count + 1) == BAD_SIZE
    assert core.lrqPackCodes(address(codes), *arguments, count) == OK
    assert (raw[count:] == 0xA5).all()
    return raw[:count]


def test_codes_are_packed_and_unpacked(core, case):
    weight = case.weight
    codes = np.empty_like(case.codes)
    assert core.lrqUnpackCodes(ctypes.byref(weight.struct()), address(codes)) == OK
    np.testing.assert_array_equal(codes, case.codes)
    np.testing.assert_array_equal(packed(core, case.codes, weight.bits, weight.layout), weight.raw)


def test_every_decoder_decodes_to_the_reference(core, case):
    for function in case.decoders:
        np.testing.assert_array_equal(case.weight.decode(core, function), case.decoded(), err_msg=function)


def test_one_perturbed_code_is_seen(core, case):
    expected = case.decoded()
    case.weight.raw[0] ^= 1
    for function in case.decoders:
        decoded = case.weight.decode(core, function)
        assert np.argwhere(decoded != expected).tolist() == [[0, 0]], function
        np.testing.assert_array_equal(decoded, case.decoded())


def test_one_perturbed_group_is_seen(core, case):
    expected = case.decoded()
    last = case.weight.levels[-1, -1]
    if last.ndim == 2:
        last[:, 2] += np.where(last[:, 2] < 0, 1, -1).astype(np.int8)  # the offset moves every level of a side by one
    else:
        last -= np.where(last > 0, 1, -1).astype(np.int8)
    for function in case.decoders:
        rows, cols = np.nonzero(case.weight.decode(core, function) != expected)
        assert rows.tolist() == [case.weight.rows - 1] * case.weight.group_size, function
        assert cols.tolist() == list(range(case.weight.cols))[-case.weight.group_size :], function


def test_tables_are_the_reference_tables(core, case):
    tables = np.empty((*case.levels.shape[:2], 1 << case.weight.bits), np.int8)
    assert core.lrqExpandTables(ctypes.byref(case.weight.struct()), address(tables)) == OK
    np.testing.assert_array_equal(tables, case.tables())


@given(
    bits=st.sampled_from((2, 3, 4)),
    rows=st.integers(1, 5),
    groups=st.integers(1, 6),
    group_size=st.integers(1, 80),
    layout=st.sampled_from(tuple(LAYOUTS)),
    form=st.sampled_from(tuple(MAKE_LEVELS)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=120)
def test_any_shape_bits_and_groups_decode_to_the_reference(core, bits, rows, groups, group_size, layout, form, seed):
    case = Case(bits, rows, groups * group_size, group_size, layout, form, seed)
    for function in case.decoders:
        np.testing.assert_array_equal(case.weight.decode(core, function), case.decoded(), err_msg=function)
    np.testing.assert_array_equal(packed(core, case.codes, bits, layout), case.weight.raw)


@given(*[st.integers(0, 2**32 - 1)] * 3)
def test_permuted_bytes_are_those_that_the_ptx_manual_says(core, low, high, selectors):
    source = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    expected = []
    for nibble in (selectors >> shift & 15 for shift in (0, 4, 8, 12)):
        byte = source[nibble & 7]
        expected.append(byte if nibble < 8 else 255 * (byte >> 7))  # prmt.b32: bit 3 replicates the sign
    permuted = core.lrqPermuteBytes(low, high, selectors)
    assert permuted.to_bytes(4, "little") == bytes(expected)
    assert core.lrqPermuteBytes(low ^ 1, high, 0x3210) != core.lrqPermuteBytes(low, high, 0x3210)


def test_the_two_layouts_hold_the_same_codes_and_are_not_mixed_up(core):
    codes = np.random.default_rng(0).integers(0, 8, (4, 64)).astype(np.uint8)
    exponents = random_exponents(np.random.default_rng(1), 4, 1, 3)
    stored, in_words = (packed_weight(codes, exponents, bits=3, group_size=64, layout=layout) for layout in LAYOUTS)
    assert stored.raw.nbytes == in_words.raw.nbytes
    expected = stored.decode(core, "lrqDecodeByWords")
    np.testing.assert_array_equal(in_words.decode(core, "lrqDecodeByWords"), expected)
    assert (replace(stored, layout=names.WORDS).decode(core, "lrqDecodeByWords") != expected).any()


@pytest.mark.parametrize(("fraction_bits", "integer_bits"), [(0, 0), (1, 8), (4, 6), (7, 0), (7, 8)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hostile_exponents_are_refused_where_the_reference_refuses_them_and_clamped_where_nobody_looks(
    core, bits, fraction_bits, integer_bits
):
    rng = np.random.default_rng(bits)
    every = rng.integers(-128, 128, (400, 1, 2, 3)).astype(np.int8)
    every[::2, ..., 1] %= 16  # half of them climb slowly enough to have a chance
    every[::2, ..., 0] %= 64
    magnitude = levels(every, bits, fraction_bits, integer_bits)
    valid = ((magnitude >= 0) & (magnitude <= 127)).all((1, 2, 3)) & (every[..., 1] >= 0).all((1, 2))
    expected = table(every, bits, fraction_bits, integer_bits)[:, 0]
    codes = np.arange(1 << bits, dtype=np.uint8)[None]
    form = {"fraction_bits": fraction_bits, "integer_bits": integer_bits}
    decoded = np.empty(1 << bits, np.int8)
    for exponents, is_valid, values in zip(every, valid, expected, strict=True):
        one = packed_weight(codes, exponents[None], bits=bits, group_size=1 << bits)
        status = core.lrqExpandTables(ctypes.byref(one.struct(**form)), address(decoded))
        assert status == (OK if is_valid else BAD_LEVELS)
        if is_valid:
            np.testing.assert_array_equal(decoded, values)
        clamped = one.decode(core, "lrqDecodeByWords", **form)
        np.testing.assert_array_equal(clamped[0], np.clip(values, -127, 127))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_minus_128_in_a_codebook_is_refused_or_clamped(core, bits):
    values = np.random.default_rng(bits).integers(-127, 128, (1, 1, 1 << bits)).astype(np.int8)
    values[0, 0, -2] = -128
    one = packed_weight(np.arange(1 << bits, dtype=np.uint8)[None], values, bits=bits, group_size=1 << bits)
    with pytest.raises(ValueError, match="table holds -128"):
        one.decode(core, "lrqDecodeByTable")
    np.testing.assert_array_equal(one.decode(core, "lrqDecodeByWords"), np.maximum(values[0], -127))


def test_int8_weights_are_what_they_are(core):
    integers = np.random.default_rng(0).integers(-127, 128, (5, 13)).astype(np.int8)
    weight = int8_weight(integers)
    np.testing.assert_array_equal(weight.decode(core, "lrqDecodeByWords"), integers)
    out = address(np.empty((5, 13), np.int8))
    for function in (core.lrqUnpackCodes, core.lrqDecodeByShifts, core.lrqDecodeByTable, core.lrqExpandTables):
        assert function(ctypes.byref(weight.struct()), out) == BAD_FORMAT
    for changes, status in (
        ({"bits": 4}, BAD_BITS), ({"codes_bytes": 64}, BAD_SIZE), ({"levels_bytes": 1}, BAD_SIZE),
        ({"layout": LAYOUTS[names.WORDS]}, BAD_FORMAT),
    ):  # fmt: skip
        assert core.lrqDecodeByWords(ctypes.byref(weight.struct(**changes)), out) == status


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"codes": None}, NULL_POINTER),
        ({"levels": None}, NULL_POINTER),
        ({"format": -1}, BAD_FORMAT),
        ({"format": 3}, BAD_FORMAT),
        ({"layout": 2}, BAD_FORMAT),
        ({"layout": -(2**31)}, BAD_FORMAT),
        ({"bits": 5}, BAD_BITS),
        ({"bits": -1}, BAD_BITS),
        ({"bits": 8}, BAD_BITS),
        ({"bits": 2}, BAD_SIZE),
        ({"fraction_bits": 8}, BAD_BITS),
        ({"fraction_bits": -(2**31)}, BAD_BITS),
        ({"integer_bits": 2**31 - 1}, BAD_BITS),
        ({"rows": 0}, BAD_SIZE),
        ({"rows": -(2**63)}, BAD_SIZE),
        ({"cols": 2**63 - 1}, BAD_SIZE),
        ({"codes_bytes": 35}, BAD_SIZE),
        ({"levels_bytes": 0}, BAD_SIZE),
        ({"group_size": 0}, BAD_GROUP),
        ({"group_size": -24}, BAD_GROUP),
        ({"group_size": 7}, BAD_GROUP),
        ({"group_size": 12}, BAD_SIZE),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hostile_fields_are_refused_and_nothing_is_written(core, changes, status, layout):
    weight = Case(3, 4, 24, 24, layout).weight
    out = np.full((4, 24), 99, np.int8)
    for function in (*(getattr(core, name) for name in DECODERS), core.lrqExpandTables):
        assert function(ctypes.byref(weight.struct(**changes)), address(out)) == status
        assert function(ctypes.byref(weight.struct()), None) == NULL_POINTER
        assert function(None, address(out)) == NULL_POINTER
    assert (out == 99).all()


@pytest.mark.parametrize(
    ("rows", "cols", "bits", "layout", "status"),
    [(0, 8, 4, 0, BAD_SIZE), (1, 2**62, 4, 0, BAD_SIZE), (1, 8, 8, 1, BAD_BITS), (1, 8, 4, 2, BAD_FORMAT),
     (1, 8, 3, 1, BAD_SIZE)],
)  # fmt: skip
def test_hostile_fields_of_packing_are_refused(core, rows, cols, bits, layout, status):
    codes, raw = np.zeros((1, 8), np.uint8), np.full(4, 99, np.uint8)
    assert core.lrqPackCodes(address(codes), rows, cols, bits, layout, address(raw), 4) == status
    assert core.lrqPackCodes(None, 1, 8, 4, 0, address(raw), 4) == NULL_POINTER
    assert (raw == 99).all()


def test_every_status_has_a_text(core):
    texts = [core.lrqStatusText(status) for status in (*range(9), 77)]
    assert len(set(texts)) == 10
    assert texts[0] == b"ok"
    assert texts[-1] == b"unknown status"
