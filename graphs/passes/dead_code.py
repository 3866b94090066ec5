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
        x = handed_on(node)
        if x is None:
            continue
        if is_graph_output(node.outputs[0], graph):
            result.skip(node, f"{node.op} hands on its input as an output of the graph, which keeps its name")
            continue
        redirect_readers(node.outputs[0], x)
    traced.forget_unused()
    result.fired = before - len(graph.nodes)
    return result


def handed_on(node: gs.Node) -> gs.Tensor | None:
    """The input of a node that is what it computes; None if it computes something else."""
    if node.domain:
        return None
    if node.op in NEUTRAL:
        return _beside_neutral(node)
    return node.inputs[0] if node.op in KEEPS and KEEPS[node.op](node) else None


def _to_its_own_type(cast: gs.Node) -> bool:
    held = cast.inputs[0].dtype
    # graphsurgeon holds ONNX's number of a type that numpy lacks, such as bfloat16.
    number = held if held is None or isinstance(held, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(held))
    return number == cast.attrs["to"]


def _in_place(transpose: gs.Node) -> bool:
    perm = transpose.attrs.get("perm")  # None: axes are reversed
    return perm is not None and perm == sorted(perm)


def _beside_neutral(node: gs.Node) -> gs.Tensor | None:
    """The operand that the other one, a constant of the op's neutral number, leaves as it is, in its own shape."""
    pairs = [tuple(node.inputs), tuple(node.inputs[::-1])] if node.op in ("Mul", "Add") else [tuple(node.inputs)]
    for x, other in pairs:
        neutral = isinstance(other, gs.Constant) and bool((other.values == NEUTRAL[node.op]).all())
        if neutral and x.shape is not None and x.shape == node.outputs[0].shape:
            return x
    return None


KEEPS = {"Identity": lambda node: True, "Cast": _to_its_own_type, "Transpose": _in_place}
NEUTRAL = {"Mul": 1, "Div": 1, "Add": 0, "Sub": 0}
