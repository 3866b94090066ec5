"""Int8Dequant: W = scale[row] w for weights kept as plain INT8 (8-bit recipes, or codes decoded ahead of time)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphs.ops.spec import AttributeValue, Example, Shape, Tensor, dims, same
from graphs.ops.weight_format import WeightFormat, dequant_op


def _integer_weight(codes: np.ndarray, *, cols: int) -> np.ndarray:
    """The codes (rows, cols) int8 are the integers."""
    if codes.ndim != 2 or codes.shape[1] != cols:
        raise ValueError(f"codes have shape {codes.shape}, needed (rows, {cols})")
    return codes


def _check_shapes(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> None:
    (codes,) = shapes
    for axis, needed in enumerate((attributes["rows"], attributes["cols"])):
        same(f"axis {axis} of codes", dims("codes", codes, 2)[axis], needed)


def _example(rng: np.random.Generator, rows: int, cols: int) -> Example:
    codes = rng.integers(-127, 128, (rows, cols)).astype(np.int8)
    return Example((codes,), {"rows": rows, "cols": cols})


_BODY = """
    weight_unit = Constant<value_float = 1.0>()
    weight = DequantizeLinear(codes, weight_unit)
"""

INT8 = WeightFormat(
    stored=(Tensor("codes", "int8", "(rows, cols), -127..127"),),
    attributes=(),
    type_vars={},
    integer_weight=_integer_weight,
    body=_BODY,
    check_shapes=_check_shapes,
    example=_example,
)

INT8_DEQUANT = dequant_op("Int8Dequant", "W (rows, cols) = codes * scale[row].", INT8, [(5, 13)])
