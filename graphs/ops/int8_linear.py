"""Int8Linear: y = quantized(x R) w^T, scaled back, plus bias, for plain INT8 weights: the sibling of TwinLogLinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphs.ops import token_product
from graphs.ops.int8_dequant import INT8_ATTRIBUTES, INT8_INPUTS, check_int8_shapes
from graphs.ops.spec import AttributeValue, Example, OpSpec, Shape, Tolerance


def int8_linear(
    x: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    *,
    rows: int,
    cols: int,
    act_bits: int,
    rotation: str = "none",
    block: int = 0,
    **_: str,
) -> np.ndarray:
    """x (..., cols) -> y (..., rows) of x's type; codes (rows, cols) int8."""
    if codes.shape != (rows, cols):
        raise ValueError(f"codes have shape {codes.shape}, needed ({rows}, {cols})")
    x = token_product.rotated(x, rotation, block)
    return token_product.token_product(x, codes, scale, bias, act_bits=act_bits)


def _infer_shape(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> Sequence[Shape]:
    x, codes, scale, bias = shapes
    check_int8_shapes(codes, scale, attributes)
    return (token_product.product_shape(x, bias, attributes),)


def _examples(rng: np.random.Generator) -> Sequence[Example]:
    return [_example(rng, act_bits, cols) for act_bits, cols in ((8, 24), (6, 13), (4, 24))]


def _example(rng: np.random.Generator, act_bits: int, cols: int) -> Example:
    rows = 6
    x = rng.standard_normal((2, 3, cols), np.float32)
    x[0, 1] = 0  # a token of zeros
    codes = rng.integers(-127, 128, (rows, cols)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, rows).astype(np.float32)
    bias = rng.standard_normal(rows, np.float32)
    return Example((x, codes, scale, bias), {"rows": rows, "cols": cols, "act_bits": act_bits})


_BODY = f"""
    weight_unit = Constant<value_float = 1.0>()
    weight = DequantizeLinear(codes, weight_unit)
{token_product.BODY}"""

INT8_LINEAR = OpSpec(
    name="Int8Linear",
    doc="Per-token quantization, an integer product with INT8 weights, scales and bias, in one node.",
    inputs=(token_product.X, *INT8_INPUTS, token_product.BIAS),
    outputs=(token_product.Y,),
    attributes=(*INT8_ATTRIBUTES, *token_product.PRODUCT_ATTRIBUTES),
    type_vars={"T": ("float", "float16", "bfloat16")},
    reference=int8_linear,
    body=_BODY,
    infer_shape=_infer_shape,
    tolerance=Tolerance(nmse={"float": 1e-12, "float16": 1e-7}, reason=token_product.FLOAT_ACCUMULATION),
    examples=_examples,
    body_valid=token_product.body_valid,
)
