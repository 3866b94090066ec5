"""What all formats of b-bit codes share: a code picks one of the 2^b integers that its row and group have.

    w[row, col] = table[row, group of col, code[row, col]]          -127..127

Formats differ by what they store for the table: `twin_log_dequant` exponents, `codebook_dequant` the table itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from graphs import names
from graphs.ops import packing, words
from graphs.ops.spec import Attribute, AttributeValue, Example, Shape, Tensor, dims, same

MAX_LEVEL = 127  # |w| fits INT8 with a sign

CODES = Tensor("codes", "C", "(rows, planes, elements), see graphs.ops.packing")

TYPE_VARS = {"C": ("int4", "int8")}

CODE_ATTRIBUTES = (
    Attribute("bits", int, "bits of a code", choices=tuple(sorted(packing.LAYOUTS))),
    Attribute("group_size", int, "columns that share their levels; divides cols; cols itself is per channel"),
)

LAYOUT = Attribute(
    "layout", str, "how codes lie: as graphs.ops.packing says, or in plugin targets only as graphs.ops.words does",
    names.STORAGE, choices=(names.STORAGE, names.WORDS),
)  # fmt: skip

# (bits, rows, cols, group_size); a Linear also has the bits of its activations in front, and an even number of codes.
DEQUANT_CASES = (
    *((4, 6, 24, 24), (3, 6, 24, 24), (2, 6, 24, 24), (4, 5, 32, 8), (3, 5, 32, 8), (2, 3, 30, 10)),
    *((bits, 3, 13, 13) for bits in (2, 3, 4)),
    *((bits, 2, 3, 3) for bits in (2, 3, 4)),
)
LINEAR_CASES = ((8, 4, 6, 24, 24), (8, 3, 6, 40, 20), (8, 2, 6, 30, 10), (6, 4, 6, 13, 13))


def codes_form(attributes: Mapping[str, AttributeValue]) -> tuple[int, tuple[int, ...]]:
    """ONNX type and shape of the codes of a node: elements (rows, planes, elements), or words (rows, bytes)."""
    bits, rows, cols = (int(attributes[key]) for key in ("bits", "rows", "cols"))
    if attributes.get("layout", names.STORAGE) == names.WORDS:
        return onnx.TensorProto.INT8, words.words_shape(bits, rows, cols)
    form = packing.layout(bits)
    return form.onnx_type, form.shape(rows, cols)


def look_up(
    codes: np.ndarray, table: np.ndarray, *, bits: int, group_size: int, cols: int, layout: str = names.STORAGE
) -> np.ndarray:
    """w (rows, cols) int8 from codes in either layout and table int8 (rows, groups, 2^bits).

    Raises ValueError for shapes that do not fit together.
    """
    unpack = words.unpack_words if layout == names.WORDS else packing.unpack_elements
    index = unpack(codes, bits, cols)
    groups = cols // group_size
    if groups * group_size != cols or table.shape[:2] != (len(index), groups):
        raise ValueError(
            f"tables of {table.shape[0]} rows and {table.shape[1]} groups do not fit {len(index)} rows of {cols} "
            f"columns in groups of {group_size}"
        )
    grouped = index.reshape(len(index), groups, group_size)
    return np.take_along_axis(table, grouped, axis=2).reshape(len(index), cols)


def check_coded_shapes(
    codes: Shape, levels: Shape, attributes: Mapping[str, AttributeValue], *, name: str, of_a_group: Sequence[int]
) -> None:
    """Raise ValueError if codes, or the levels (rows, groups, *of_a_group) called `name`, do not fit the attributes."""
    rows, cols, group = (attributes[key] for key in ("rows", "cols", "group_size"))
    if group < 1 or cols % group:
        raise ValueError(f"group_size {group} does not divide the {cols} columns")
    _, needed = codes_form(attributes)
    for axis, (got, size) in enumerate(zip(dims("codes", codes, len(needed)), needed, strict=True)):
        same(f"axis {axis} of codes", got, size)
    shape = (rows, cols // group, *of_a_group)
    for axis, needed in enumerate(shape):
        same(f"axis {axis} of {name}", dims(name, levels, len(shape))[axis], needed)


def random_codes(rng: np.random.Generator, bits: int, rows: int, cols: int) -> np.ndarray:
    """Packed elements of (rows, cols) random codes, in the type that a node takes."""
    return packing.typed_elements(packing.pack(rng.integers(0, 1 << bits, (rows, cols)), bits))


def coded_example(
    rng: np.random.Generator, levels: np.ndarray, bits: int, rows: int, cols: int, group_size: int
) -> Example:
    """Random codes beside the given levels."""
    attributes = {"bits": bits, "group_size": group_size, "rows": rows, "cols": cols}
    return Example((random_codes(rng, bits, rows, cols), levels), attributes)


# Reads codes; gives `code_index` (rows, groups, group_size) int32, and constants that the parts after it use.
CODES_BODY = """
    one = Constant<value_float = 1.0>()
    element = DequantizeLinear(codes, one)

    zero = Constant<value_int = 0>()
    one_i = Constant<value_int = 1>()
    four = Constant<value_int = 4>()
    eight = Constant<value_int = 8>()
    axis0 = Constant<value_ints = [0]>()
    axis1 = Constant<value_ints = [1]>()
    axis3 = Constant<value_ints = [3]>()
    rest = Constant<value_ints = [-1]>()
    n_bits = Constant<value_int: int = @bits>()
    n_rows = Constant<value_int: int = @rows>()
    n_cols = Constant<value_int: int = @cols>()
    n_group = Constant<value_int: int = @group_size>()
    rows_1d = Unsqueeze(n_rows, axis0)
    cols_1d = Unsqueeze(n_cols, axis0)
    group_1d = Unsqueeze(n_group, axis0)
    powers = Constant<value_floats = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]>()

    # Fields (rows, planes, elements, per) of an element, low first. 4-bit fields fill an INT4, narrower share an INT8.
    planes = Shape<start = 1, end = 2>(element)
    plane_count = Squeeze(planes, axis0)
    width = Div(n_bits, plane_count)
    is_int4 = Equal(width, four)
    element_bits = Where(is_int4, four, eight)
    per = Div(element_bits, width)
    element_range = Gather(powers, element_bits)
    wraps = Div(element, element_range)
    wraps_floor = Floor(wraps)
    wraps_low = Mul(wraps_floor, element_range)
    unsigned = Sub(element, wraps_low)
    unsigned_4d = Unsqueeze(unsigned, axis3)
    slot = Range(zero, per, one_i)
    slot_bit = Mul(slot, width)
    slot_power = Gather(powers, slot_bit)
    field_high = Div(unsigned_4d, slot_power)
    field_floor = Floor(field_high)
    field_range = Gather(powers, width)
    field = Mod<fmod = 1>(field_floor, field_range)

    # code (rows, groups, group_size) = sum over planes of field << (width * plane)
    plane = Range(zero, plane_count, one_i)
    plane_bit = Mul(plane, width)
    plane_power = Gather(powers, plane_bit)
    to_planes = Constant<value_ints = [1, -1, 1, 1]>()
    plane_weight = Reshape(plane_power, to_planes)
    weighted = Mul(field, plane_weight)
    padded = ReduceSum<keepdims = 0>(weighted, axis1)
    flat_shape = Concat<axis = 0>(rows_1d, rest)
    flat = Reshape(padded, flat_shape)
    start = Constant<value_ints = [0]>()
    code = Slice(flat, start, cols_1d, axis1)
    grouped_shape = Concat<axis = 0>(rows_1d, rest, group_1d)
    code_grouped = Reshape(code, grouped_shape)
    code_index = Cast<to = 6>(code_grouped)
"""

# Reads `code_index` and `level_table` (rows, groups, 2^bits) float; gives `weight`, the integers w as float.
LOOK_UP_BODY = """
    value = GatherElements<axis = 2>(level_table, code_index)
    weight_shape = Concat<axis = 0>(rows_1d, cols_1d)
    weight = Reshape(value, weight_shape)
"""
