"""Schemas, bodies and node attributes of the dialect as a whole."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import onnx
import onnx.parser
import pytest

from graphs import names
from graphs.ops import OPS, attach_bodies, detach_bodies, register
from graphs.ops.hadamard_rotate import HADAMARD_ROTATE, rotation_attributes
from graphs.ops.int8_linear import INT8_LINEAR
from graphs.ops.rms_norm_rotate import RMS_NORM_ROTATE
from graphs.ops.spec import Attribute
from graphs.ops.twin_log_dequant import TWIN_LOG_DEQUANT

ROTATE = 'lrq.HadamardRotate<block = 8, base = 1, order = 0, plugin_version = "1", plugin_namespace = "">'


def parse(body, imports='"" : 21, "lrq" : 1'):
    return onnx.parser.parse_model(
        f"<ir_version: 9, opset_import: [{imports}]>\n"
        f"g (float[n, 8] x, float[8] s, bool c) => (float[n, 8] y) {{ {body} }}"
    )


def test_schemas_can_be_registered_twice():
    register()
    register()
    assert onnx.defs.has("TwinLogDequant", names.OPSET, names.DOMAIN)


def test_exactly_the_bodies_in_use_are_attached_and_attaching_twice_changes_nothing():
    model = attach_bodies(parse(f"y = {ROTATE}(x, s)"))
    assert [function.name for function in model.functions] == ["HadamardRotate"]
    assert model.ir_version == names.IR_VERSION
    once = model.SerializeToString()
    assert attach_bodies(model).SerializeToString() == once


def test_a_node_inside_a_subgraph_gets_its_body():
    branch = f"y = If(c)<then_branch = t () => (float[n, 8] a) {{ a = {ROTATE}(x, s) }}," \
             " else_branch = e () => (float[n, 8] b) { b = Identity(x) }>"  # fmt: skip
    assert [function.name for function in attach_bodies(parse(branch)).functions] == ["HadamardRotate"]


def test_detaching_removes_our_bodies_and_keeps_others():
    model = attach_bodies(parse(f"y = {ROTATE}(x, s)"))
    model.functions.append(
        onnx.parser.parse_function('<domain: "else", opset_import: ["" : 21]> F (x) => (y) { y = Identity(x) }')
    )
    assert [function.name for function in detach_bodies(model).functions] == ["F"]


def test_a_model_without_lrq_nodes_is_left_alone():
    model = parse("y = Identity(x)", imports='"" : 17')
    before = model.SerializeToString()
    assert attach_bodies(model).SerializeToString() == before


def test_a_fused_rotation_has_no_body():
    node = INT8_LINEAR.node("xwsb", ["y"], rows=8, cols=8, act_bits=8, rotation="hadamard", block=8)
    model = parse("y = Identity(x)")
    model.graph.node.append(node)
    with pytest.raises(ValueError, match="rotation 'hadamard' is fused into the node"):
        attach_bodies(model)


def test_an_unknown_lrq_op_is_named():
    with pytest.raises(ValueError, match="no op 'HadamardRotat' in the dialect"):
        attach_bodies(parse("y = lrq.HadamardRotat(x, s)"))


def test_an_older_opset_is_refused():
    with pytest.raises(ValueError, match="imports ONNX opset 17; bodies need 21"):
        attach_bodies(parse(f"y = {ROTATE}(x, s)", imports='"" : 17, "lrq" : 1'))


def test_attributes_are_filled_in_with_their_defaults():
    attributes = TWIN_LOG_DEQUANT.node_attributes(bits=4, group_size=np.int64(8), rows=2, cols=8)
    assert attributes == {
        "bits": 4, "group_size": 8, "fraction_bits": 4, "integer_bits": 6, "rows": 2, "cols": 8,
        "plugin_version": "1", "plugin_namespace": "",
    }  # fmt: skip
    assert type(attributes["group_size"]) is int


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bitz": 4}, ValueError, "no attribute 'bitz'; it has bits, group_size"),
        ({"bits": 5}, ValueError, r"bits is 5; it must be one of \[2, 3, 4\]"),
        ({"bits": 4.0}, TypeError, "bits takes an integer, got 4.0"),
        ({"bits": True}, TypeError, "bits takes an integer, got True"),
        ({"plugin_version": 1}, TypeError, "plugin_version takes a string, got 1"),
        ({"rows": None}, ValueError, "rows is required"),
    ],
)
def test_wrong_attributes_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        TWIN_LOG_DEQUANT.node_attributes(**{"bits": 4, "group_size": 8, "rows": 2, "cols": 8} | changes)


@pytest.mark.parametrize("value", [1e-6, 1, np.float64(0.1), np.float16(0.5), Fraction(1, 3)])
def test_a_float_attribute_is_kept_as_the_float32_that_a_node_holds(value):
    attributes = rotation_attributes(72) | {"epsilon": value}
    kept = RMS_NORM_ROTATE.node_attributes(**attributes)["epsilon"]
    assert (type(kept), kept) == (float, float(np.float32(float(value))))
    node = RMS_NORM_ROTATE.node(["x", "scale", "shift", "signs"], ["y"], **attributes)
    assert RMS_NORM_ROTATE.attributes_of(node)["epsilon"] == kept


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), ValueError, "epsilon is nan; it must be finite in float32"),
        (float("-inf"), ValueError, "epsilon is -inf; it must be finite"),
        (1e39, ValueError, r"epsilon is 1e\+39; it must be finite"),
        ("1e-6", TypeError, "epsilon takes a number, got '1e-6'"),
        (True, TypeError, "epsilon takes a number, got True"),
        (None, ValueError, "epsilon is required: added to the mean square"),
    ],
)
def test_what_is_no_finite_float_is_refused(value, error, message):
    with pytest.raises(error, match=f"RMSNormRotate.{message}"):
        RMS_NORM_ROTATE.node_attributes(**rotation_attributes(72), epsilon=value)


@pytest.mark.parametrize("default", [1e-05, 0.5, 3.0, -2e20])
def test_a_float_default_reaches_schema_and_body(default):
    epsilon = Attribute("epsilon", float, "added to the mean square", default)
    spec = replace(RMS_NORM_ROTATE, attributes=(epsilon, *HADAMARD_ROTATE.attributes))
    as_float32 = float(np.float32(default))
    assert spec.node_attributes(**rotation_attributes(72))["epsilon"] == as_float32
    assert spec.schema().attributes["epsilon"].default_value.f == as_float32
    (declared,) = [each for each in spec.function().attribute_proto if each.name == "epsilon"]
    assert (declared.type, declared.f) == (onnx.AttributeProto.FLOAT, as_float32)


def test_attributes_survive_the_way_through_a_node():
    node = HADAMARD_ROTATE.node(["x", "s"], ["y"], **rotation_attributes(72))
    expected = {"block": 72, "base": 36, "order": 17, "plugin_version": "1", "plugin_namespace": ""}
    assert HADAMARD_ROTATE.attributes_of(node) == expected


def test_a_factorization_that_does_not_belong_to_the_block_is_refused():
    x, signs = np.zeros((1, 72), np.float32), np.ones(72, np.float32)
    with pytest.raises(ValueError, match="block 72 factorizes with base 36 and order 17, got 12 and 11"):
        OPS["HadamardRotate"].reference(x, signs, block=72, base=12, order=11)
