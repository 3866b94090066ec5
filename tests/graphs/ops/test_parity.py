"""Every op of the dialect: its body in stock ONNX Runtime computes what its numpy reference says, and can fail."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from graphs import names
from graphs.ops import OPS, attach_bodies
from graphs.ops.spec import Example

CASES = [
    pytest.param(spec, index, id=f"{spec.name}-{index}")
    for spec in OPS.values()
    for index in range(len(spec.examples(np.random.default_rng(0))))
]
TYPES = [pytest.param(spec, dtype, id=f"{spec.name}-{dtype}") for spec in OPS.values() for dtype in spec.tolerance.nmse]
SPECS = [pytest.param(spec, id=name) for name, spec in OPS.items()]


def example_of(spec, index=0):
    return spec.examples(np.random.default_rng(0))[index]


def reference(spec, example):
    return spec.reference(*example.inputs, **spec.node_attributes(**example.attributes))


def nmse(got, expected):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    expected = expected.astype(np.float64)
    return float(((got - expected) ** 2).sum() / (expected**2).sum())


def perturbed(spec, example):
    """The example with one element of one parameter changed: a code's lowest bit, or a sign."""
    inputs = [array.copy() for array in example.inputs]
    index = next(i for i, tensor in enumerate(spec.inputs) if tensor.name != "x")
    first = inputs[index].flat[0]
    inputs[index].flat[0] = -first if spec.inputs[index].type == "T" else int(first) ^ 1
    return Example(tuple(inputs), example.attributes)


@pytest.mark.parametrize(("spec", "index"), CASES)
def test_the_body_computes_the_reference(spec, index, run_body):
    example = example_of(spec, index)
    assert nmse(run_body(spec, example), reference(spec, example)) <= spec.tolerance.nmse["float"]


@pytest.mark.parametrize(("spec", "dtype"), TYPES)
def test_the_body_is_within_the_tolerance_of_every_type(spec, dtype, run_body, cast):
    example = cast(spec, example_of(spec), dtype)
    assert nmse(run_body(spec, example), reference(spec, example)) <= spec.tolerance.nmse[dtype]


@pytest.mark.parametrize(("spec", "dtype"), TYPES)
def test_one_perturbed_code_is_beyond_the_tolerance(spec, dtype, run_body, cast):
    example = cast(spec, example_of(spec), dtype)
    assert nmse(run_body(spec, perturbed(spec, example)), reference(spec, example)) > spec.tolerance.nmse[dtype]


@pytest.mark.parametrize("spec", SPECS)
def test_folding_the_body_into_constants_changes_no_bit(spec, run_body):
    example = example_of(spec)
    np.testing.assert_array_equal(run_body(spec, example), run_body(spec, example, disable_quant_qdq="1"))


@pytest.mark.parametrize("spec", SPECS)
def test_the_body_holds_only_ops_that_tensorrt_imports(spec):
    refused = {"BitwiseAnd", "BitwiseOr", "BitShift", "MatMulInteger", "QLinearMatMul", "If", "Loop", "Scan"}
    body = spec.function()
    assert not refused & {node.op_type for node in body.node}
    assert {node.domain for node in body.node} == {""}  # no nested lrq call: see OpSpec.body
    packed = {tensor.name for tensor in spec.inputs if tensor.type in ("C", "int8")}
    readers = {node.op_type for node in body.node if packed & set(node.input)}
    assert readers <= {"DequantizeLinear"}


@pytest.mark.parametrize("spec", SPECS)
def test_every_line_of_the_body_is_needed(spec):
    body = spec.function()
    read = {name for node in body.node for name in node.input} | set(body.output)
    assert [name for node in body.node for name in node.output if name not in read] == []


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_of_one_node_passes_the_checker_with_and_without_its_body(spec, one_node):
    model = one_node(spec, example_of(spec))
    onnx.checker.check_model(model, full_check=True)
    onnx.checker.check_model(attach_bodies(model), full_check=True)


@pytest.mark.parametrize("spec", SPECS)
def test_the_schema_refuses_a_misspelt_attribute(spec, one_node):
    model = one_node(spec, example_of(spec))
    model.graph.node[0].attribute[0].name += "z"
    with pytest.raises(onnx.checker.ValidationError, match=r"Unrecognized attribute|Required attribute"):
        onnx.checker.check_model(model)


@pytest.mark.parametrize("spec", SPECS)
def test_shapes_and_types_pass_through_a_node_without_its_body(spec, one_node):
    example = example_of(spec)
    model = one_node(spec, example)
    model.graph.output[0].type.Clear()
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type
    expected = reference(spec, example)
    shape = [dim.dim_value or dim.dim_param for dim in inferred.shape.dim]
    assert shape[-1] == expected.shape[-1]
    assert len(shape) == expected.ndim
    if spec.inputs[0].name == "x":  # free dimensions keep their names
        assert shape[:-1] == [f"n{axis}" for axis in range(expected.ndim - 1)]
    assert inferred.elem_type == onnx.helper.np_dtype_to_tensor_dtype(expected.dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_shape_inference_refuses_parameters_that_do_not_fit(spec, one_node):
    model = one_node(spec, example_of(spec))
    model.graph.initializer[-1].dims[0] += 1
    with pytest.raises(Exception, match=f"{spec.name}.*needed"):
        onnx.shape_inference.infer_shapes(model, strict_mode=True)


@pytest.mark.parametrize("spec", SPECS)
def test_the_function_declares_every_attribute_of_the_node(spec, one_node):
    body = spec.function()
    declared = {*body.attribute, *(attribute.name for attribute in body.attribute_proto)}
    node = one_node(spec, example_of(spec)).graph.node[0]
    assert declared == {attribute.name for attribute in node.attribute}
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert values["plugin_version"].decode() == names.PLUGIN_VERSION
    assert values["plugin_namespace"].decode() == names.PLUGIN_NAMESPACE
