"""Remove a rotation and the inverse that follows it.

    HadamardRotate(HadamardRotate(x, s), 1)  ->  x diag(s)      since H H = 1 where H is symmetric

x alone if s is ones, else a rotation of block 1. H is symmetric for powers of two and for Paley's second construction,
whose prime is 1 modulo 4; the first one's is not its own inverse.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphs.ops.hadamard_rotate import rotation_attributes
from graphs.passes.patterns import is_graph_output, is_lrq, producer, redirect_readers
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def cancel_rotations(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for second in [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]:
        first = producer(second.inputs[0])
        if first is None or not is_lrq(first, "HadamardRotate"):
            continue
        obstacle = _obstacle(first, second, traced)
        if obstacle is not None:
            result.skip(second, obstacle)
            continue
        x, signs = first.inputs
        if (signs.values == 1).all():
            redirect_readers(second.outputs[0], x)
        else:
            second.inputs = [x, signs]
            second.attrs |= rotation_attributes(1)
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def _obstacle(first: gs.Node, second: gs.Node, traced: TracedGraph) -> str | None:
    if any(node.inputs[1].name not in traced.signs for node in (first, second)):
        return "signs are not in the table of signs"
    if first.attrs["block"] != second.attrs["block"] or not np.all(second.inputs[1].values == 1):
        return "it follows another rotation, which it does not undo"
    if int(first.attrs["order"]) % 4 == 3:
        return f"it follows a rotation of the same {first.attrs['block']} channels, whose matrix is not symmetric"
    if is_graph_output(second.outputs[0], traced.graph):
        return "the tensor that is rotated back is an output of the graph"
    return None
