"""CodebookDequant: W (rows, cols) from packed codes into a free table of INT8 values.

A code of b bits is an index; for each (row, group) 2^b integers are stored, 2^b bytes a group:

    w = table[row, group, code],  |w| <= 127,  W = scale[row] w

The sibling of `TwinLogDequant` for levels that no exponents express. The quantizer writes tables in ascending order;
any order decodes. Every step is exact, so torch, numpy and ONNX agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphs import names
from graphs.ops import coded_weight
from graphs.ops.coded_weight import MAX_LEVEL
from graphs.ops.spec import AttributeValue, Example, Shape, Tensor
from graphs.ops.weight_format import WeightFormat, dequant_op


def validate_table(table: np.ndarray, bits: int) -> None:
    """Raise ValueError unless the table is (rows, groups, 2^bits) int8 without -128."""
    if table.dtype != np.int8 or table.ndim != 3 or table.shape[2] != 1 << bits:
        raise ValueError(f"table is {table.dtype}{list(table.shape)}, needed int8[rows, groups, {1 << bits}]")
    bad = table < -MAX_LEVEL
    if bad.any():
        row, group, code = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"table of row {row}, group {group} has {table[row, group, code]} at code {code}, "
            f"needed {-MAX_LEVEL}..{MAX_LEVEL}"
        )


def integer_weight(
    codes: np.ndarray, table: np.ndarray, *, bits: int, group_size: int, cols: int, layout: str = names.STORAGE
) -> np.ndarray:
    """The integers w (rows, cols) int8 from elements (rows, planes, elements) of int8 or int4, or words int8.

    Raises ValueError for a table that is not valid, or shapes that do not fit together.
    """
    validate_table(table, bits)
    return coded_weight.look_up(codes, table, bits=bits, group_size=group_size, cols=cols, layout=layout)


def random_table(rng: np.random.Generator, rows: int, groups: int, bits: int) -> np.ndarray:
    """A table (rows, groups, 2^bits) int8 whose values ascend and are all different."""
    order = rng.permuted(np.tile(np.arange(-MAX_LEVEL, MAX_LEVEL + 1), (rows, groups, 1)), axis=2)
    return np.sort(order[:, :, : 1 << bits], axis=2).astype(np.int8)


def _check_shapes(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> None:
    codes, table = shapes
    of_a_group = (1 << attributes["bits"],)
    coded_weight.check_coded_shapes(codes, table, attributes, name="table", of_a_group=of_a_group)


def _example(rng: np.random.Generator, bits: int, rows: int, cols: int, group_size: int) -> Example:
    table = random_table(rng, rows, cols // group_size, bits)
    return coded_weight.coded_example(rng, table, bits, rows, cols, group_size)


_TABLE_BODY = """
    level_table = DequantizeLinear(table, one)
"""

CODEBOOK = WeightFormat(
    stored=(coded_weight.CODES, Tensor("table", "int8", "(rows, groups, 2^bits), -127..127")),
    attributes=coded_weight.CODE_ATTRIBUTES,
    product_attributes=(coded_weight.LAYOUT,),
    type_vars=coded_weight.TYPE_VARS,
    integer_weight=integer_weight,
    body=f"{coded_weight.CODES_BODY}{_TABLE_BODY}{coded_weight.LOOK_UP_BODY}",
    check_shapes=_check_shapes,
    example=_example,
)

CODEBOOK_DEQUANT = dequant_op(
    "CodebookDequant",
    "W (rows, cols) from packed codes into a table of INT8 values per row and group, and one scale per row.",
    CODEBOOK,
    coded_weight.DEQUANT_CASES,
)
