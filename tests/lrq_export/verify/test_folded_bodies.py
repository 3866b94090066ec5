"""Bodies made for the attributes of their nodes compute, bit for bit, what the bodies of the dialect do."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from graphs import names
from graphs.ops import OPS, attach_bodies
from graphs.ops.hadamard_rotate import rotation_attributes
from lrq_export.verify.folded_bodies import fold_bodies


def model_of(nodes, tensors):
    """A model of these nodes, in which every tensor is an initializer."""
    outputs = [onnx.ValueInfoProto(name=node.output[0]) for node in nodes]
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    opsets = [helper.make_opsetid("", names.ONNX_OPSET), helper.make_opsetid(names.DOMAIN, names.OPSET)]
    graph = helper.make_graph(nodes, "nodes", [], outputs, initializers)
    return attach_bodies(helper.make_model(graph, opset_imports=opsets, ir_version=names.IR_VERSION))


def folded(model):
    nodes, functions = fold_bodies(model.graph.node, model.functions)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:], copy.functions[:]
    copy.graph.node.extend(nodes)
    copy.functions.extend(functions)
    return copy


def answers(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {})


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS.keys())
def test_every_op_computes_the_same_bits_by_fewer_nodes(spec):
    example = spec.examples(np.random.default_rng(0))[0]
    tensors = {tensor.name: array for tensor, array in zip(spec.inputs, example.inputs, strict=True)}
    model = model_of([spec.node(list(tensors), ["out"], name="node", **example.attributes)], tensors)
    after = folded(model)
    np.testing.assert_array_equal(answers(after)[0], answers(model)[0])
    (function,), (body,) = after.functions, model.functions
    assert (len(function.node) < len(body.node)) == (spec.name != "Int8Dequant")  # which computes nothing of its own
    assert [node.name for node in after.graph.node] == ["node"]


def rotations(*blocks):
    x = np.random.default_rng(0).standard_normal((3, 24), np.float32)
    spec = OPS["HadamardRotate"]
    nodes = [
        spec.node(["x", "signs"], [f"y{index}"], name=f"r{index}", **rotation_attributes(block))
        for index, block in enumerate(blocks)
    ]
    return model_of(nodes, {"x": x, "signs": np.ones(24, np.float32)})


def test_nodes_of_other_attributes_have_bodies_of_their_own_and_equal_ones_share():
    model = rotations(4, 8, 4)
    after = folded(model)
    assert [node.op_type for node in after.graph.node] == [
        "HadamardRotate.1", "HadamardRotate.2", "HadamardRotate.1"]  # fmt: skip
    assert len(after.functions) == 2
    wanted = answers(model)
    for got, was in zip(answers(after), wanted, strict=True):
        np.testing.assert_array_equal(got, was)
    assert not np.array_equal(wanted[0], wanted[1])  # the wrong body would be seen


def test_an_attribute_that_a_node_leaves_out_has_its_default():
    text = f"""<ir_version: 10, opset_import: ["" : 21, "{names.DOMAIN}" : 1]>
    g (float[2] x) => (y, z) {{ y = {names.DOMAIN}.Times(x) z = {names.DOMAIN}.Times<factor = 5>(x) }}
    <domain: "{names.DOMAIN}", opset_import: ["" : 21]> Times <factor: int = 3> (a) => (b)
    {{ k = Constant<value_int: int = @factor>() f = Cast<to = 1>(k) b = Mul(a, f) }}"""
    model = onnx.parser.parse_model(text)
    del model.graph.input[:]
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1, 2]), "x"))
    assert [answer.tolist() for answer in answers(folded(model))] == [[3, 6], [5, 10]]


def test_other_nodes_and_functions_stay_as_they_are():
    text = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
    g (float[2] x) => (float[2] y) { t = own.Twice(x) y = Relu(t) }
    <domain: "own", opset_import: ["" : 21]> Twice (a) => (b) { b = Add(a, a) }"""
    model = onnx.parser.parse_model(text)
    nodes, functions = fold_bodies(model.graph.node, model.functions)
    assert nodes == list(model.graph.node)
    assert functions == list(model.functions)
