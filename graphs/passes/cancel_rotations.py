"""Remove a rotation and the inverse that follows it.

    HadamardRotate(HadamardRotate(x, s), 1)  ->  x diag(s)      since H H = 1 where H is symmetric

x alone if s is ones, else a rotation of block 1. H is symmetric for powers of two and for Paley's second construction,
whose prime is 1 modulo 4; the first one's is not its own inverse.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphs.ops.hadamard_rotate import rotation_attributes
from graphs.passes.channels import NoMatch
from graphs.passes.patterns import is_graph_output, is_lrq, producer, redirect_readers, remove_node
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def cancel_rotations(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for second in [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]:
        try:
            result.fired += cancel(second, traced)
        except NoMatch as reason:
            result.skip(second, str(reason))
    if result.fired:
        traced.forget_unused()
    return result


def cancel(second: gs.Node, traced: TracedGraph) -> bool:
    """Whether `second` undid another rotation, and both are gone; raises NoMatch if it follows one that it keeps."""
    first = producer(second.inputs[0])
    if first is None or not is_lrq(first, "HadamardRotate"):
        return False
    _check(first, second, traced)
    x, signs = first.inputs
    if (signs.values == 1).all():
        redirect_readers(second.outputs[0], x)
        remove_node(second, traced.graph)
    else:
        second.inputs = [x, signs]
        second.attrs |= rotation_attributes(1)
    (rotated,) = first.outputs
    if not rotated.outputs and not is_graph_output(rotated, traced.graph):
        remove_node(first, traced.graph)  # at once: what it reads has one reader less
    return True


def _check(first: gs.Node, second: gs.Node, traced: TracedGraph) -> None:
    if any(node.inputs[1].name not in traced.signs for node in (first, second)):
        raise NoMatch("signs are not in the table of signs")
    if first.attrs["block"] != second.attrs["block"] or not np.all(second.inputs[1].values == 1):
        raise NoMatch("it follows another rotation, which it does not undo")
    if int(first.attrs["order"]) % 4 == 3:
        block = first.attrs["block"]
        raise NoMatch(f"it follows a rotation of the same {block} channels, whose matrix is not symmetric")
    if is_graph_output(second.outputs[0], traced.graph):
        raise NoMatch("the tensor that is rotated back is an output of the graph")
