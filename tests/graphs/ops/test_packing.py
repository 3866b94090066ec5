"""Packed codes are the bits that the layout table promises, and unpacking gives them back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.ops.packing import elements, from_tensor, layout, pack, to_tensor, typed_elements, unpack, unpack_elements

BITS = [2, 3, 4]


@st.composite
def code_arrays(draw):
    bits = draw(st.sampled_from(BITS))
    rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    return bits, np.random.default_rng(seed).integers(0, 1 << bits, (rows, cols)).astype(np.uint8)


@given(code_arrays())
def test_unpacking_gives_the_codes_back(case):
    bits, codes = case
    packed = pack(codes, bits)
    np.testing.assert_array_equal(unpack(packed), codes)
    np.testing.assert_array_equal(unpack_elements(typed_elements(packed), bits, codes.shape[1]), codes)
    assert from_tensor(to_tensor("codes", packed), bits, codes.shape[1]) == packed


@given(code_arrays())
def test_one_changed_code_changes_the_packed_bytes(case):
    bits, codes = case
    changed = codes.copy()
    changed[-1, -1] ^= 1
    assert pack(changed, bits).raw != pack(codes, bits).raw


@given(code_arrays())
def test_a_runtime_sees_the_elements_that_onnx_decodes(case):
    bits, codes = case
    packed = pack(codes, bits)
    decoded = onnx.numpy_helper.to_array(to_tensor("codes", packed))
    np.testing.assert_array_equal(decoded.astype(np.int8), elements(packed))
    assert decoded.dtype == typed_elements(packed).dtype


def test_four_bits_are_int4_low_nibble_first():
    packed = pack(np.array([[1, 15, 8]]), 4)
    assert (packed.shape, packed.raw) == ((1, 1, 3), bytes([0xF1, 0x08]))
    assert elements(packed).ravel().tolist() == [1, -1, -8]


def test_three_bits_are_three_planes_of_one_bit():
    packed = pack(np.array([[0b001, 0b010, 0b100, 0b111, 0, 0, 0, 0b011, 0b101]]), 3)
    assert packed.shape == (1, 3, 2)
    assert packed.raw == bytes([0b10001001, 1, 0b10001010, 0, 0b00001100, 1])


def test_two_bits_are_four_codes_a_byte():
    assert pack(np.array([[1, 2, 3, 0, 2]]), 2).raw == bytes([0b00111001, 0b10])


def test_sizes_are_what_the_bits_promise():
    codes = np.zeros((16, 64), np.uint8)
    assert [len(pack(codes, bits).raw) * 8 / codes.size for bits in BITS] == BITS


def test_codes_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"codes span \[0, 8\], needed \[0, 7\]"):
        pack(np.array([[0, 8]]), 3)
    with pytest.raises(ValueError, match=r"codes have shape \(2,\)"):
        pack(np.array([0, 1]), 3)
    with pytest.raises(ValueError, match="no storage layout for 5-bit codes"):
        layout(5)


def test_a_truncated_or_mistyped_tensor_is_refused():
    tensor = to_tensor("w", pack(np.zeros((2, 8), np.uint8), 3))
    with pytest.raises(ValueError, match=r"w: packed codes are INT8\[2, 3, 1\], needed INT8\[2, 3, 2\]"):
        from_tensor(tensor, 3, 9)
    with pytest.raises(ValueError, match="needed INT4"):
        from_tensor(tensor, 4, 8)
    tensor.raw_data = tensor.raw_data[:-1]
    with pytest.raises(ValueError, match="w: 5 bytes of packed codes, needed 6"):
        from_tensor(tensor, 3, 8)
