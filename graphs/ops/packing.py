"""How b-bit codes lie in memory: the storage layout that file, function bodies, C++ core and plugins share.

Codes C (rows, cols), 0 <= code < 2^bits, become a tensor (rows, planes, elements). Each element holds `per` fields of
`width` bits, low first; plane p holds bits [width * p, width * (p + 1)) of every code:

    code = sum over p of field_p << (width * p)

    bits  type  planes  width  per    one element                            codes in it (column c = per * element + j)
    4     INT4  1       4      1      [3 2 1 0]                              bits 3..0 of code c
    3     INT8  3       1      8      [j=7 j=6 j=5 j=4 j=3 j=2 j=1 j=0]      bit p of codes c = 8 e .. 8 e + 7
    2     INT8  1       2      4      [j=3 .. | j=2 .. | j=1 .. | j=0 ..]    bits 1..0 of codes c = 4 e .. 4 e + 3

`cols` is padded with zero codes to a multiple of `per`. The 4-bit code c is the INT4 with the same four bits (c - 16
for c >= 8), and raw INT4 data is two elements a byte, low nibble first, as ONNX stores it. INT8 and INT4, never UINT8
or UINT4: TensorRT widens or refuses those. TensorRT wants an even number of INT4 elements: keep rows or cols even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx


@dataclass(frozen=True)
class Layout:
    """One row of the table above. `element_bits` = width * per is the size of an element."""

    bits: int
    planes: int
    width: int
    per: int
    onnx_type: int

    @property
    def element_bits(self) -> int:
        return self.width * self.per

    def shape(self, rows: int, cols: int) -> tuple[int, int, int]:
        """The packed shape (rows, planes, elements) of (rows, cols) codes."""
        return rows, self.planes, -(-cols // self.per)

    def raw_bytes(self, rows: int, cols: int) -> int:
        """Bytes of (rows, cols) codes as ONNX stores them: two INT4 elements share one."""
        return -(-math.prod(self.shape(rows, cols)) * self.element_bits // 8)


LAYOUTS = {
    4: Layout(4, planes=1, width=4, per=1, onnx_type=onnx.TensorProto.INT4),
    3: Layout(3, planes=3, width=1, per=8, onnx_type=onnx.TensorProto.INT8),
    2: Layout(2, planes=1, width=2, per=4, onnx_type=onnx.TensorProto.INT8),
}


@dataclass(frozen=True)
class Packed:
    """Packed codes: what an initializer holds. `raw` is the tensor's raw_data, `cols` the columns without padding."""

    bits: int
    cols: int
    shape: tuple[int, int, int]
    onnx_type: int
    raw: bytes


def layout(bits: int) -> Layout:
    """The storage layout of `bits`-bit codes. Raises ValueError for a width that has none."""
    if bits not in LAYOUTS:
        raise ValueError(f"no storage layout for {bits}-bit codes; there is one for {sorted(LAYOUTS)}")
    return LAYOUTS[bits]


def check_codes(codes: np.ndarray, bits: int) -> None:
    """Raise ValueError unless codes are (rows, cols), all of them in [0, 2^bits), of a width that has a layout."""
    layout(bits)
    if codes.ndim != 2:
        raise ValueError(f"codes have shape {codes.shape}, needed (rows, cols)")
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise ValueError(f"codes span [{codes.min()}, {codes.max()}], needed [0, {(1 << bits) - 1}]")


def pack(codes: np.ndarray, bits: int) -> Packed:
    """Pack codes (rows, cols) of any integer type. Raises ValueError if one is not in [0, 2^bits)."""
    check_codes(codes, bits)
    form, (rows, cols) = layout(bits), codes.shape
    shape = form.shape(rows, cols)
    padded = np.pad(codes.astype(np.uint8), ((0, 0), (0, shape[2] * form.per - cols)))
    grouped = padded.reshape(rows, 1, shape[2], form.per)
    plane = form.width * np.arange(form.planes, dtype=np.uint8).reshape(1, -1, 1, 1)
    fields = (grouped >> plane) & ((1 << form.width) - 1)
    position = form.width * np.arange(form.per, dtype=np.uint8)
    element = np.bitwise_or.reduce(fields << position, axis=-1).astype(np.uint8)
    raw = element.tobytes() if form.element_bits == 8 else _join_nibbles(element)
    return Packed(bits, cols, shape, form.onnx_type, raw)


def unpack(packed: Packed) -> np.ndarray:
    """The codes (rows, cols) uint8: the inverse of `pack`."""
    return unpack_elements(elements(packed), packed.bits, packed.cols)


def elements(packed: Packed) -> np.ndarray:
    """The elements (rows, planes, elements) int8 as a runtime sees them: INT4 sign-extended."""
    if packed.onnx_type == onnx.TensorProto.INT8:
        return np.frombuffer(packed.raw, np.int8).reshape(packed.shape)
    nibbles = np.frombuffer(packed.raw, np.uint8)
    low_first = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(-1)[: int(np.prod(packed.shape))]
    return ((low_first ^ 8).astype(np.int8) - np.int8(8)).reshape(packed.shape)


def typed_elements(packed: Packed) -> np.ndarray:
    """`elements` in the numpy type of the ONNX type: `ml_dtypes.int4` or int8."""
    array = elements(packed)
    return array.astype(ml_dtypes.int4) if packed.onnx_type == onnx.TensorProto.INT4 else array


def unpack_elements(array: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """The codes (rows, cols) uint8 held in elements (rows, planes, elements) of int8 or int4.

    Raises ValueError if the shape is not that of (rows, cols) codes.
    """
    form = layout(bits)
    needed = form.shape(len(array), cols)
    if array.shape != needed:
        raise ValueError(f"packed codes have shape {array.shape}, needed {needed} for {bits} bits and {cols} columns")
    element = array.astype(np.int8).view(np.uint8) & np.uint8((1 << form.element_bits) - 1)
    position = form.width * np.arange(form.per, dtype=np.uint8)
    fields = (element[..., None] >> position) & np.uint8((1 << form.width) - 1)
    plane = form.width * np.arange(form.planes, dtype=np.uint8).reshape(1, -1, 1, 1)
    codes = np.bitwise_or.reduce(fields << plane, axis=1)
    return codes.reshape(len(array), -1)[:, :cols]


def to_tensor(name: str, packed: Packed) -> onnx.TensorProto:
    """The packed codes as an initializer."""
    return onnx.TensorProto(name=name, data_type=packed.onnx_type, dims=packed.shape, raw_data=packed.raw)


def from_tensor(tensor: onnx.TensorProto, bits: int, cols: int) -> Packed:
    """The inverse of `to_tensor`. Raises ValueError if type, shape or size is not that of (rows, cols) codes."""
    form = layout(bits)
    shape = tuple(tensor.dims)
    if tensor.data_type != form.onnx_type or len(shape) != 3 or shape != form.shape(shape[0], cols):
        got = f"{onnx.TensorProto.DataType.Name(tensor.data_type)}{list(shape)}"
        needed = f"{onnx.TensorProto.DataType.Name(form.onnx_type)}{list(form.shape(shape[0] if shape else 0, cols))}"
        raise ValueError(f"{tensor.name}: packed codes are {got}, needed {needed}")
    size = form.raw_bytes(shape[0], cols)
    if len(tensor.raw_data) != size:
        raise ValueError(f"{tensor.name}: {len(tensor.raw_data)} bytes of packed codes, needed {size}")
    return Packed(bits, cols, shape, form.onnx_type, tensor.raw_data)


def _join_nibbles(element: np.ndarray) -> bytes:
    flat = element.reshape(-1)
    flat = np.pad(flat, (0, flat.size % 2))
    return (flat[0::2] | flat[1::2] << 4).tobytes()
