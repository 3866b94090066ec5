"""Bodies of dialect nodes with what depends on attributes alone computed: a session is made several times as fast.

A body derives its Hadamard matrix or its mantissas from attributes by a hundred nodes. ONNX Runtime folds them as well,
but for every node of the model anew, after it has copied them all into the graph.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import onnx
from onnx import helper, numpy_helper

from graphs import names

KEPT_BODIES = 256  # a model has a few dozen


def fold_bodies(
    nodes: Iterable[onnx.NodeProto], functions: Sequence[onnx.FunctionProto]
) -> tuple[list[onnx.NodeProto], list[onnx.FunctionProto]]:
    """The same nodes and bodies, but each node of a dialect body calls one made for its attributes, and has none."""
    bodies = {function.name: function.SerializeToString() for function in functions if function.domain == names.DOMAIN}
    made: dict[tuple[str, bytes], onnx.FunctionProto] = {}
    calls = []
    for node in nodes:
        if node.domain == names.DOMAIN and node.op_type in bodies:
            attributes = onnx.NodeProto(attribute=sorted(node.attribute, key=lambda each: each.name))
            key = (node.op_type, attributes.SerializeToString())
            if key not in made:
                made[key] = onnx.FunctionProto()
                made[key].CopyFrom(_folded(bodies[node.op_type], key[1]))
                made[key].name = f"{node.op_type}.{len(made)}"
            node = helper.make_node(made[key].name, node.input, node.output, node.name, domain=names.DOMAIN)
        calls.append(node)
    return calls, [*(each for each in functions if each.domain != names.DOMAIN), *made.values()]


@lru_cache(KEPT_BODIES)
def _folded(body: bytes, attributes: bytes) -> onnx.FunctionProto:
    """The body for these attributes (of a serialized node), what reads no input as constants; not to be edited."""
    function = onnx.FunctionProto.FromString(body)
    _bind(function, onnx.NodeProto.FromString(attributes).attribute)
    known: set[str] = set()
    fixed, rest = [], []
    for node in function.node:
        computable = all(name in known for name in node.input if name)
        (fixed if computable else rest).append(node)
        known.update(node.output if computable else ())
    wanted = {name for node in rest for name in node.input} | set(function.output)
    constants = _computed(function, fixed, sorted(wanted & known))
    del function.node[:]
    function.node.extend([*constants, *rest])
    return function


def _bind(function: onnx.FunctionProto, given: Iterable[onnx.AttributeProto]) -> None:
    """Put the values of attributes, or their defaults, in place of the references to them."""
    values = {each.name: each for each in (*function.attribute_proto, *given)}
    for node in function.node:
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                name, value = attribute.name, values[attribute.ref_attr_name]
                attribute.CopyFrom(value)
                attribute.name = name
    del function.attribute[:]
    del function.attribute_proto[:]


def _computed(function: onnx.FunctionProto, fixed: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    """A Constant for each of `outputs`, which the nodes `fixed` compute."""
    import onnxruntime

    if not outputs:
        return []
    graph = helper.make_graph(fixed, "fixed", [], [onnx.ValueInfoProto(name=name) for name in outputs])
    model = helper.make_model(graph, opset_imports=function.opset_import, ir_version=names.IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(outputs, {})
    return [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in zip(outputs, values, strict=True)
    ]
