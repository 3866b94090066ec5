"""A format of quantized weights, W (rows, cols) = scale[row] w, and what its ops have in common.

    <Format>Dequant(stored..., scale)          ->  W                                            `dequant_op`
    <Format>Linear(x, stored..., scale, bias)  ->  quantized(x R) w^T, scaled back, plus bias   `linear_op`

A format says how the integers w lie in its inputs; what follows from them is written once for all formats, here and
in `token_product`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphs.ops.spec import Attribute, AttributeValue, Example, OpSpec, Shape, Tensor, Tolerance, dims, same

SCALE = Tensor("scale", "float", "(rows,)")

SIZES = (
    Attribute("rows", int, "rows of W, output channels"),
    Attribute("cols", int, "columns of W, input channels"),
)


@dataclass(frozen=True)
class WeightFormat:
    """How the integers w (rows, cols), -127..127, lie in the inputs and attributes of a node.

    stored: the inputs that hold w; SCALE follows them.
    attributes: what w depends on beside its sizes.
    type_vars: of the stored inputs.
    integer_weight: stored arrays positionally, all attributes and `cols` as keywords -> w int8; raises ValueError.
    body: ONNX text from the stored inputs and all attributes to `weight`, w as float (rows, cols).
    check_shapes: (shapes of the stored inputs, attributes); raises ValueError where known sizes disagree.
    example: (generator, *case) -> the stored arrays, and the attributes with the sizes.
    product_attributes: what w depends on in linear ops alone, where a plugin may run; the body reads their defaults.
    """

    stored: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    type_vars: Mapping[str, tuple[str, ...]]
    integer_weight: Callable[..., np.ndarray]
    body: str
    check_shapes: Callable[[Sequence[Shape], Mapping[str, AttributeValue]], None]
    example: Callable[..., Example]
    product_attributes: tuple[Attribute, ...] = ()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (*self.stored, SCALE)

    def all_attributes(self) -> tuple[Attribute, ...]:
        return (*self.attributes, *SIZES)

    def decode(self, tensors: Sequence[np.ndarray], attributes: Mapping[str, AttributeValue]) -> np.ndarray:
        """w (rows, cols) int8 from the arrays of `inputs`. Raises ValueError if weight or scale does not fit."""
        *stored, scale = tensors
        known = {"cols", *(attribute.name for attribute in (*self.attributes, *self.product_attributes))}
        weight = self.integer_weight(*stored, **{name: attributes[name] for name in known & attributes.keys()})
        rows, cols = attributes["rows"], attributes["cols"]
        if weight.shape != (rows, cols) or scale.shape != (rows,):
            raise ValueError(f"weight {weight.shape} and scale {scale.shape}, needed ({rows}, {cols}) and ({rows},)")
        return weight

    def check_all_shapes(self, shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> None:
        """Raise ValueError if the shapes of `inputs` do not agree with the attributes of their node."""
        *stored, scale = shapes
        self.check_shapes(stored, attributes)
        same("scale", dims("scale", scale, 1)[0], attributes["rows"])

    def scaled_example(self, rng: np.random.Generator, case: Sequence[int]) -> Example:
        """The arrays of `inputs` and the attributes of one case."""
        example = self.example(rng, *case)
        scale = rng.uniform(0.001, 0.01, example.attributes["rows"]).astype(np.float32)
        return Example((*example.inputs, scale), example.attributes)


def dequant_op(name: str, doc: str, weight: WeightFormat, cases: Sequence[Sequence[int]]) -> OpSpec:
    """The op that gives W (rows, cols) float32 = scale (rows,) w, one rounding per weight; `cases` are its examples."""

    def dequantize(*tensors: np.ndarray, **attributes: AttributeValue) -> np.ndarray:
        return tensors[-1].astype(np.float32)[:, None] * weight.decode(tensors, attributes).astype(np.float32)

    def infer_shape(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> Sequence[Shape]:
        weight.check_all_shapes(shapes, attributes)
        return ((attributes["rows"], attributes["cols"]),)

    return OpSpec(
        name=name,
        doc=doc,
        inputs=weight.inputs,
        outputs=(Tensor("w", "float", "(rows, cols)"),),
        attributes=weight.all_attributes(),
        type_vars=weight.type_vars,
        reference=dequantize,
        body=f"{weight.body}{_SCALE_BODY}",
        infer_shape=infer_shape,
        tolerance=Tolerance({"float": 0.0}, "integers up to 127 and one multiplication: every bit is defined"),
        examples=lambda rng: [weight.scaled_example(rng, case) for case in cases],
    )


_SCALE_BODY = """
    scale_axis = Constant<value_ints = [1]>()
    scale_column = Unsqueeze(scale, scale_axis)
    w = Mul(weight, scale_column)
"""
