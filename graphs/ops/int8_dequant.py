"""Int8Dequant: W = scale[row] w for weights kept as plain INT8 (8-bit recipes, or twin-log decoded ahead of time)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphs.ops.spec import Attribute, AttributeValue, Example, OpSpec, Shape, Tensor, Tolerance, dims, same


def int8_dequant(codes: np.ndarray, scale: np.ndarray, *, rows: int, cols: int, **_: str) -> np.ndarray:
    """W (rows, cols) float32 from codes (rows, cols) int8 and scale (rows,) float32, one rounding per weight."""
    if codes.shape != (rows, cols) or scale.shape != (rows,):
        raise ValueError(f"codes {codes.shape} and scale {scale.shape}, needed ({rows}, {cols}) and ({rows},)")
    return scale.astype(np.float32)[:, None] * codes.astype(np.float32)


def check_int8_shapes(codes: Shape, scale: Shape, attributes: Mapping[str, AttributeValue]) -> None:
    """Raise ValueError if the shapes of INT8 weights do not agree with the attributes of their node."""
    for axis, needed in enumerate((attributes["rows"], attributes["cols"])):
        same(f"axis {axis} of codes", dims("codes", codes, 2)[axis], needed)
    same("scale", dims("scale", scale, 1)[0], attributes["rows"])


def _infer_shape(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> Sequence[Shape]:
    check_int8_shapes(*shapes, attributes)
    return ((attributes["rows"], attributes["cols"]),)


def _examples(rng: np.random.Generator) -> Sequence[Example]:
    rows, cols = 5, 13
    codes = rng.integers(-127, 128, (rows, cols)).astype(np.int8)
    return [Example((codes, rng.uniform(0.001, 0.01, rows).astype(np.float32)), {"rows": rows, "cols": cols})]


_BODY = """
    one = Constant<value_float = 1.0>()
    weight = DequantizeLinear(codes, one)
    axis1 = Constant<value_ints = [1]>()
    scale_column = Unsqueeze(scale, axis1)
    w = Mul(weight, scale_column)
"""

INT8_INPUTS = (Tensor("codes", "int8", "(rows, cols), -127..127"), Tensor("scale", "float", "(rows,)"))

INT8_ATTRIBUTES = (
    Attribute("rows", int, "rows of W, output channels"),
    Attribute("cols", int, "columns of W, input channels"),
)

INT8_DEQUANT = OpSpec(
    name="Int8Dequant",
    doc="W (rows, cols) = codes * scale[row].",
    inputs=INT8_INPUTS,
    outputs=(Tensor("w", "float", "(rows, cols)"),),
    attributes=INT8_ATTRIBUTES,
    type_vars={},
    reference=int8_dequant,
    body=_BODY,
    infer_shape=_infer_shape,
    tolerance=Tolerance(nmse={"float": 0.0}, reason="one multiplication: every bit is defined"),
    examples=_examples,
)
