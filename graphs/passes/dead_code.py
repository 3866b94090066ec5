"""Remove nodes that nothing needs: those that no output depends on, and those that hand on their input as it is.

    Identity(x), Cast<to = the type of x>(x), Transpose<perm = [0, 1, ...]>(x), Mul(x, 1), Add(x, 0)  ->  x

What computes an output of the graph stays, since the output keeps its name.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphs.passes.patterns import is_graph_output, redirect_readers
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def dead_code(traced: TracedGraph) -> PassResult:
    result, graph, before = PassResult(), traced.graph, len(traced.graph.nodes)
    for node in list(graph.nodes):
        if not hands_on(node):
            continue
        if is_graph_output(node.outputs[0], graph):
            result.skip(node, f"{node.op} hands on its input as an output of the graph, which keeps its name")
            continue
        redirect_readers(node.outputs[0], node.inputs[0])
    traced.forget_unused()
    result.fired = before - len(graph.nodes)
    return result


def hands_on(node: gs.Node) -> bool:
    """Whether the first input of a node is what it computes."""
    if node.domain:
        return False
    if node.op == "Identity":
        return True
    if node.op == "Cast":
        held = node.inputs[0].dtype
        # graphsurgeon holds ONNX's number of a type that numpy lacks, such as bfloat16.
        number = held if held is None or isinstance(held, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(held))
        return number == node.attrs["to"]
    if node.op == "Transpose":
        return node.attrs.get("perm") == list(range(len(node.inputs[0].shape or ())))
    if node.op in NEUTRAL and isinstance(node.inputs[1], gs.Constant):
        same_shape = node.inputs[0].shape is not None and node.inputs[0].shape == node.outputs[0].shape
        return same_shape and bool((node.inputs[1].values == NEUTRAL[node.op]).all())
    return False


NEUTRAL = {"Mul": 1, "Div": 1, "Add": 0, "Sub": 0}
