"""Words of codes hold the bits that their table promises, and give the codes back, whatever the width."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs import names
from graphs.ops import OPS, packing
from graphs.ops.words import UNITS, prepack, unpack_words, words_shape

BITS = [2, 3, 4]
# Every op whose codes may lie in words.
OF_CODES = [name for name, spec in OPS.items() if "layout" in {each.name for each in spec.attributes}]


@st.composite
def code_arrays(draw):
    bits = draw(st.sampled_from(BITS))
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 100))
    seed = draw(st.integers(0, 2**32 - 1))
    return bits, np.random.default_rng(seed).integers(0, 1 << bits, (rows, cols)).astype(np.uint8)


def place(bits: int, col: int, bit: int) -> tuple[int, int]:
    """The word of its row, and the bit of that word, which holds `bit` of the code in column `col`."""
    if bits != 3:
        per = 32 // bits
        return col // per, bits * (col % per) + bit
    unit, within = divmod(col, 32)
    word, nibble = divmod(within, 8)
    return (3 * unit + word, 4 * nibble + bit) if word < 3 else (3 * unit + bit, 4 * nibble + 3)


def bit_by_bit(codes: np.ndarray, bits: int) -> bytes:
    per_row = words_shape(bits, *codes.shape)[1] // 4
    written = b""
    for row in codes.tolist():
        words = [0] * per_row
        for col, code in enumerate(row):
            for bit in range(bits):
                word, at = place(bits, col, bit)
                assert not words[word] >> at & 1
                words[word] |= (code >> bit & 1) << at
        written += b"".join(word.to_bytes(4, "little") for word in words)
    return written


@given(code_arrays())
def test_every_bit_is_where_the_table_says(case):
    bits, codes = case
    assert prepack(codes, bits).tobytes() == bit_by_bit(codes, bits)


@given(code_arrays())
def test_unpacking_gives_the_codes_back(case):
    bits, codes = case
    words = prepack(codes, bits)
    assert (words.dtype, words.shape) == (np.int8, words_shape(bits, *codes.shape))
    np.testing.assert_array_equal(unpack_words(words, bits, codes.shape[1]), codes)


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_any_full_words_are_codes(bits, rows, units, seed):
    """No bit is spare."""
    cols = units * UNITS[bits].codes
    words = np.random.default_rng(seed).integers(-128, 128, words_shape(bits, rows, cols)).astype(np.int8)
    np.testing.assert_array_equal(prepack(unpack_words(words, bits, cols), bits), words)


@given(code_arrays())
def test_the_bits_of_a_code_are_in_one_word_or_spread_over_three(case):
    bits, codes = case
    changed = codes.copy()
    changed[-1, -1] ^= (1 << bits) - 1
    differ = (prepack(changed, bits) != prepack(codes, bits)).reshape(len(codes), -1, 4).any(-1)
    spread = bits == 3 and (codes.shape[1] - 1) % 32 >= 24
    assert differ.sum() == (3 if spread else 1)


@given(code_arrays())
def test_stacked_rows_are_stacked_bytes(case):
    bits, codes = case
    whole = np.concatenate([codes, codes[::-1]])
    np.testing.assert_array_equal(
        prepack(whole, bits), np.concatenate([prepack(codes, bits), prepack(codes[::-1], bits)])
    )


def words_of(codes, bits) -> list[int]:
    return prepack(np.array([codes]), bits).view("<u4").ravel().tolist()


def test_four_bits_are_eight_codes_a_word():
    assert words_of([1, 2, 3, 4, 5, 6, 7, 8, 15], 4) == [0x87654321, 0xF]


def test_two_bits_are_sixteen_codes_a_word():
    assert words_of([1, 2, 3] + [0] * 13 + [3], 2) == [0b111001, 0b11]


def test_three_bits_are_thirty_two_codes_in_three_words():
    codes = [1] * 8 + [2] * 8 + [4] * 8 + [0b001, 0b010, 0b100] + [0] * 5 + [5]
    # Code 24 has bit 0 set, code 25 bit 1, code 26 bit 2: bit 3 of nibbles 0, 1 and 2 of words A, B and C.
    assert words_of(codes, 3) == [0x11111119, 0x222222A2, 0x44444C44, 5, 0, 0]


def test_full_rows_of_four_and_two_bits_are_the_bytes_of_storage():
    codes = np.random.default_rng(0).integers(0, 4, (3, 32))
    for bits in (2, 4):
        assert prepack(codes, bits).tobytes() == packing.pack(codes, bits).raw


def test_sizes_are_what_the_bits_promise():
    codes = np.zeros((16, 64), np.uint8)
    assert [prepack(codes, bits).nbytes * 8 / codes.size for bits in BITS] == BITS


def test_what_is_no_codes_or_words_is_refused():
    with pytest.raises(ValueError, match=r"codes span \[0, 8\], needed \[0, 7\]"):
        prepack(np.array([[0, 8]]), 3)
    with pytest.raises(ValueError, match="no storage layout for 5-bit codes"):
        prepack(np.array([[0, 8]]), 5)
    with pytest.raises(ValueError, match=r"are int8\[2, 12\], needed int8\[2, 24\] for 3 bits and 33 columns"):
        unpack_words(np.zeros((2, 12), np.int8), 3, 33)
    with pytest.raises(ValueError, match=r"are uint8\[2, 12\], needed int8\[2, 12\]"):
        unpack_words(np.zeros((2, 12), np.uint8), 3, 32)


def in_words(spec, example):
    """The inputs of an example with its codes in words instead, and the attributes that say so."""
    attributes = dict(example.attributes) | {"layout": names.WORDS}
    place = [tensor.name for tensor in spec.inputs].index("codes")
    inputs = list(example.inputs)
    codes = packing.unpack_elements(inputs[place], attributes["bits"], attributes["cols"])
    inputs[place] = prepack(codes, attributes["bits"])
    return inputs, spec.node_attributes(**attributes)


def test_the_linear_ops_of_codes_read_words():
    assert OF_CODES == ["TwinLogLinear", "CodebookLinear", "TwinLogLinearResidual", "CodebookLinearResidual"]


@pytest.mark.parametrize("name", OF_CODES)
def test_a_node_computes_the_same_from_words(name):
    spec = OPS[name]
    for example in spec.examples(np.random.default_rng(0)):
        expected = spec.reference(*example.inputs, **spec.node_attributes(**example.attributes))
        inputs, attributes = in_words(spec, example)
        np.testing.assert_array_equal(spec.reference(*inputs, **attributes), expected)
        assert spec.infer_shape([array.shape for array in inputs], attributes) == (expected.shape,)


@pytest.mark.parametrize("name", OF_CODES)
def test_one_changed_bit_of_a_word_changes_what_a_node_computes(name):
    spec = OPS[name]
    for example in spec.examples(np.random.default_rng(0)):
        inputs, attributes = in_words(spec, example)
        expected = spec.reference(*inputs, **attributes)
        inputs[1] = inputs[1].copy()
        inputs[1].flat[0] ^= 1
        assert (spec.reference(*inputs, **attributes) != expected).any()


@pytest.mark.parametrize("name", OF_CODES)
def test_shapes_of_the_other_layout_are_refused(name):
    spec = OPS[name]
    example = spec.examples(np.random.default_rng(0))[0]
    inputs, attributes = in_words(spec, example)
    with pytest.raises(ValueError, match="codes has 3 axes, needed 2"):
        spec.infer_shape([array.shape for array in example.inputs], attributes)
    with pytest.raises(ValueError, match="codes has 2 axes, needed 3"):
        spec.infer_shape([array.shape for array in inputs], spec.node_attributes(**example.attributes))
    with pytest.raises(ValueError, match="words of codes are"):
        spec.reference(*example.inputs, **attributes)


@pytest.mark.parametrize("name", OF_CODES)
def test_the_body_reads_storage_only(name):
    spec = OPS[name]
    attributes = spec.node_attributes(**spec.examples(np.random.default_rng(0))[0].attributes)
    assert spec.body_valid(attributes) is None
    problem = spec.body_valid(attributes | {"layout": names.WORDS})
    assert problem == "its codes lie in layout 'words'; only a plugin reads that, the body does not"
