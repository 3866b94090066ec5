"""TwinLogLinear: y = quantized(x R) w^T, scaled back, plus bias, with w decoded from twin-log codes: one plugin call.

Made only by lowering. Its numbers are those of `TwinLogDequant` (the integers w) and `token_product`. The rotation R
may be fused (`rotation="hadamard"`) in targets that run plugins; the body computes `rotation="none"` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphs import names
from graphs.ops import packing, token_product
from graphs.ops.spec import AttributeValue, Example, OpSpec, Shape, Tolerance
from graphs.ops.twin_log_dequant import (
    INTEGER_BODY,
    PACKED_ATTRIBUTES,
    PACKED_INPUTS,
    check_packed_shapes,
    integer_weight,
    random_exponents,
)


def twin_log_linear(
    x: np.ndarray,
    codes: np.ndarray,
    exponents: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    *,
    act_bits: int,
    rotation: str = "none",
    block: int = 0,
    rows: int,
    plugin_version: str = names.PLUGIN_VERSION,
    plugin_namespace: str = names.PLUGIN_NAMESPACE,
    **decoding: int,
) -> np.ndarray:
    """x (..., cols) -> y (..., rows) of x's type; `decoding` are the attributes of `integer_weight`."""
    weight = integer_weight(codes, exponents, **decoding)
    if len(weight) != rows:
        raise ValueError(f"codes of {len(weight)} rows, needed {rows}")
    x = token_product.rotated(x, rotation, block)
    return token_product.token_product(x, weight, scale, bias, act_bits=act_bits)


def _infer_shape(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> Sequence[Shape]:
    x, codes, exponents, scale, bias = shapes
    check_packed_shapes(codes, exponents, scale, attributes)
    return (token_product.product_shape(x, bias, attributes),)


def _examples(rng: np.random.Generator) -> Sequence[Example]:
    cases = [(4, 8, 24, 24), (3, 8, 40, 20), (2, 8, 30, 10), (4, 6, 13, 13)]
    return [_example(rng, *case) for case in cases]


def _example(rng: np.random.Generator, bits: int, act_bits: int, cols: int, group_size: int) -> Example:
    rows = 6
    x = rng.standard_normal((2, 3, cols), np.float32)
    x[0, 1] = 0  # a token of zeros
    codes = packing.typed_elements(packing.pack(rng.integers(0, 1 << bits, (rows, cols)), bits))
    exponents = random_exponents(rng, rows, cols // group_size, bits)
    scale = rng.uniform(0.001, 0.01, rows).astype(np.float32)
    bias = rng.standard_normal(rows, np.float32)
    attributes = {"bits": bits, "group_size": group_size, "rows": rows, "cols": cols, "act_bits": act_bits}
    return Example((x, codes, exponents, scale, bias), attributes)


# Pasted, not called: TensorRT's parser does not hand attribute references on to a function called by a function.
_BODY = f"{INTEGER_BODY}{token_product.BODY}"

TWIN_LOG_LINEAR = OpSpec(
    name="TwinLogLinear",
    doc="Per-token quantization, an integer product with decoded twin-log weights, scales and bias, in one node.",
    inputs=(token_product.X, *PACKED_INPUTS, token_product.BIAS),
    outputs=(token_product.Y,),
    attributes=(*PACKED_ATTRIBUTES, *token_product.PRODUCT_ATTRIBUTES),
    type_vars={"T": ("float", "float16", "bfloat16"), "C": ("int4", "int8")},
    reference=twin_log_linear,
    body=_BODY,
    infer_shape=_infer_shape,
    tolerance=Tolerance(nmse={"float": 1e-12, "float16": 1e-7}, reason=token_product.FLOAT_ACCUMULATION),
    examples=_examples,
    body_valid=token_product.body_valid,
)
