"""What an lrq op is: one record per op, from which schema, function body and node attributes are derived.

Each op file of this folder builds one `OpSpec`. Derived from it, never written twice: the `OpSchema` that makes the
ONNX checker refuse a misspelt attribute and lets shape inference pass through our nodes, the `FunctionProto` that lets
a runtime without our plugins execute the node, and the full attribute list that a plugin creator expects.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.parser

from graphs import names

Dim = int | str | None  # a known size, a named size, or unknown
Shape = tuple[Dim, ...] | None  # None: not even the rank is known
AttributeValue = int | float | str

_ELEMENT_TYPES = {
    name: getattr(onnx.TensorProto, name.upper()) for name in ("float", "float16", "bfloat16", "int4", "int8", "int32")
}
_ATTRIBUTE_TYPES = {
    int: onnx.defs.OpSchema.AttrType.INT,
    float: onnx.defs.OpSchema.AttrType.FLOAT,
    str: onnx.defs.OpSchema.AttrType.STRING,
}
_TEXT_TYPES = {int: "int", float: "float", str: "string"}


@dataclass(frozen=True)
class Tensor:
    """An input or output. `type` is an ONNX element type ("int8") or a type variable of the op ("T")."""

    name: str
    type: str
    shape: str


@dataclass(frozen=True)
class Attribute:
    """An attribute of kind `int`, `float` or `str`; without a default it is required. `choices` lists what is accepted.

    A float is finite, and kept as the float32 that a node holds.
    """

    name: str
    kind: type
    doc: str
    default: AttributeValue | None = None
    choices: tuple[AttributeValue, ...] = ()


@dataclass(frozen=True)
class Tolerance:
    """The NMSE against the reference that a body or kernel may add, per type of T, and why it is not zero."""

    nmse: Mapping[str, float]
    reason: str


@dataclass(frozen=True)
class Example:
    """Inputs in the order of the op, and attributes. INT4 inputs are `ml_dtypes.int4` arrays."""

    inputs: tuple[np.ndarray, ...]
    attributes: Mapping[str, AttributeValue]


@dataclass(frozen=True)
class OpSpec:
    """Everything that decides what one op means.

    reference: numpy function; inputs positionally, attributes as keywords, returns the single output.
    body: ONNX text, one step a line, over the input, output and attribute names; `@name` refers to an attribute. It
        calls no lrq op: TensorRT's parser (RTX 1.7) reads a reference that a body passes on to a function as zero.
    infer_shape: (input shapes, attributes) -> output shapes; raises ValueError where known sizes disagree.
    examples: generator -> inputs on which body and reference are compared, so that a new op tests itself.
    body_valid: attributes -> None, or the reason why the body does not express this node.
    """

    name: str
    doc: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    type_vars: Mapping[str, tuple[str, ...]]
    reference: Callable[..., np.ndarray]
    body: str
    infer_shape: Callable[[Sequence[Shape], Mapping[str, AttributeValue]], Sequence[Shape]]
    tolerance: Tolerance
    examples: Callable[[np.random.Generator], Sequence[Example]]
    body_valid: Callable[[Mapping[str, AttributeValue]], str | None] = lambda attributes: None

    def all_attributes(self) -> tuple[Attribute, ...]:
        """The op's own attributes, then the two that make a loaded TensorRT plugin win over the body."""
        return (*self.attributes, *PLUGIN_ATTRIBUTES)

    def schema(self) -> onnx.defs.OpSchema:
        """The OpSchema, with type and shape inference."""
        schema = onnx.defs.OpSchema(
            self.name,
            names.DOMAIN,
            names.OPSET,
            self.doc,
            inputs=[self._parameter(tensor) for tensor in self.inputs],
            outputs=[self._parameter(tensor) for tensor in self.outputs],
            type_constraints=[
                (variable, [f"tensor({element})" for element in elements], "")
                for variable, elements in self.type_vars.items()
            ],
            attributes=[_schema_attribute(attribute) for attribute in self.all_attributes()],
        )
        schema.set_type_and_shape_inference_function(self._infer)
        return schema

    def function(self) -> onnx.FunctionProto:
        """The body as a FunctionProto; it declares every attribute, those of the plugin too."""
        declared = ", ".join(_text_attribute(attribute) for attribute in self.all_attributes())
        inputs = ", ".join(tensor.name for tensor in self.inputs)
        outputs = ", ".join(tensor.name for tensor in self.outputs)
        return onnx.parser.parse_function(
            f'<domain: "{names.DOMAIN}", opset_import: ["" : {names.ONNX_OPSET}]>\n'
            f"{self.name} <{declared}> ({inputs}) => ({outputs})\n{{\n{self.body}\n}}"
        )

    def node_attributes(self, **attributes: AttributeValue) -> dict[str, AttributeValue]:
        """All attributes of a node: the given ones checked, defaults and plugin attributes filled in.

        Raises ValueError for an unknown, missing or out-of-range attribute, TypeError for a wrong type.
        """
        known = {attribute.name: attribute for attribute in self.all_attributes()}
        for unknown in attributes.keys() - known.keys():
            raise ValueError(f"{self.name}: no attribute {unknown!r}; it has {', '.join(known)}")
        return {name: self._checked(attribute, attributes.get(name)) for name, attribute in known.items()}

    def node(
        self, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes: AttributeValue
    ) -> onnx.NodeProto:
        """A NodeProto of this op with every attribute of `node_attributes`."""
        return onnx.helper.make_node(
            self.name, inputs, outputs, name=name, domain=names.DOMAIN, **self.node_attributes(**attributes)
        )

    def attributes_of(self, node: onnx.NodeProto) -> dict[str, AttributeValue]:
        """The attributes of an existing node as Python values, checked like `node_attributes`."""
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        return self.node_attributes(
            **{name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
        )

    def _checked(self, attribute: Attribute, value: AttributeValue | None) -> AttributeValue:
        where = f"{self.name}.{attribute.name}"
        if value is None:
            if attribute.default is None:
                raise ValueError(f"{where} is required: {attribute.doc}")
            value = attribute.default
        if attribute.kind is int:
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{where} takes an integer, got {value!r}")
            value = operator.index(value)
        elif attribute.kind is float:
            value = _float32(where, value)
        elif not isinstance(value, str):
            raise TypeError(f"{where} takes a string, got {value!r}")
        if attribute.choices and value not in attribute.choices:
            raise ValueError(f"{where} is {value!r}; it must be one of {list(attribute.choices)}")
        return value

    def _parameter(self, tensor: Tensor) -> onnx.defs.OpSchema.FormalParameter:
        type_name = tensor.type if tensor.type in self.type_vars else f"tensor({tensor.type})"
        return onnx.defs.OpSchema.FormalParameter(tensor.name, type_name, tensor.shape)

    def _infer(self, context: Any) -> None:
        """Called by ONNX's C++ shape inference. An exception here would be one without a node name: say the op."""
        given = [context.get_input_type(index) for index in range(context.get_num_inputs())]
        attributes = {a.name: _proto_attribute(context, a) for a in self.all_attributes()}
        missing = [name for name, value in attributes.items() if value is None]
        if missing:
            raise onnx.shape_inference.InferenceError(f"{self.name}: attribute {missing[0]!r} is missing")
        try:
            shapes = self.infer_shape([_shape(proto) for proto in given], attributes)
        except ValueError as error:
            raise onnx.shape_inference.InferenceError(f"{self.name}: {error}") from error
        for index, (tensor, shape) in enumerate(zip(self.outputs, shapes, strict=True)):
            context.set_output_type(index, _type_proto(self._element_type(tensor.type, given), shape))

    def _element_type(self, type_name: str, given: Sequence[onnx.TypeProto]) -> int:
        if type_name not in self.type_vars:
            return _ELEMENT_TYPES[type_name]
        bound = next(i for i, tensor in enumerate(self.inputs) if tensor.type == type_name)
        return given[bound].tensor_type.elem_type


PLUGIN_ATTRIBUTES = (
    Attribute("plugin_version", str, "version TensorRT's parser looks the plugin up by", names.PLUGIN_VERSION),
    Attribute("plugin_namespace", str, "namespace TensorRT's parser looks the plugin up by", names.PLUGIN_NAMESPACE),
)


def same(what: str, got: Dim, needed: Dim) -> None:
    """Raise ValueError if two sizes are both known and differ."""
    if isinstance(got, int) and isinstance(needed, int) and got != needed:
        raise ValueError(f"{what} is {got}, needed {needed}")


def dims(what: str, shape: Shape, rank: int) -> tuple[Dim, ...]:
    """The sizes of a shape that must have `rank` axes, all unknown if the shape is. Raises ValueError."""
    if shape is None:
        return (None,) * rank
    if len(shape) != rank:
        raise ValueError(f"{what} has {len(shape)} axes, needed {rank}")
    return shape


def fits(what: str, shape: Shape, onto: str, target: Shape) -> None:
    """Raise ValueError unless `shape` broadcasts to `target`, whose name is `onto`, and ends in its last axis.

    It may have fewer axes and axes of 1, but none of the target's may grow: not (B, 1, n) to (n,) nor (5, n) to (1, n).
    """
    if shape is None or target is None:
        return
    if not 0 < len(shape) <= len(target):
        raise ValueError(f"{what} has {len(shape)} axes, needed 1..{len(target)}, no more than {onto} has")
    same(f"the last axis of {what}", shape[-1], target[-1])
    for axis, (got, needed) in enumerate(zip(shape, target[-len(shape) :], strict=True)):
        if got != 1:
            same(f"axis {axis} of {what}, which broadcasts to {onto},", got, needed)


def _float32(where: str, value: AttributeValue) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where} takes a number, got {value!r}")
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not math.isfinite(rounded):
        raise ValueError(f"{where} is {value!r}; it must be finite in float32")
    return rounded


def _schema_attribute(attribute: Attribute) -> onnx.defs.OpSchema.Attribute:
    if attribute.default is None:
        return onnx.defs.OpSchema.Attribute(
            attribute.name, _ATTRIBUTE_TYPES[attribute.kind], attribute.doc, required=True
        )
    default = onnx.helper.make_attribute(attribute.name, attribute.default)
    return onnx.defs.OpSchema.Attribute(attribute.name, default, attribute.doc)


def _text_attribute(attribute: Attribute) -> str:
    if attribute.default is None:
        return attribute.name
    value = f'"{attribute.default}"' if attribute.kind is str else str(attribute.default)
    return f"{attribute.name}: {_TEXT_TYPES[attribute.kind]} = {value}"


def _proto_attribute(context: Any, attribute: Attribute) -> AttributeValue | None:
    proto = context.get_attribute(attribute.name)
    if proto is None:
        return attribute.default
    value = onnx.helper.get_attribute_value(proto)
    return value.decode() if isinstance(value, bytes) else value


def _shape(proto: onnx.TypeProto | None) -> Shape:
    if proto is None or not proto.tensor_type.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in proto.tensor_type.shape.dim
    )


def _type_proto(element_type: int, shape: Shape) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(element_type, shape)
