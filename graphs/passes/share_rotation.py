"""Rewrite HadamardRotate(x), HadamardRotate(x), ... with one rotation into one node read by all consumers.

q, k and v of a self-attention read the same normalized input; so do k and v of a cross-attention.
"""

from graphs.passes.patterns import is_graph_output, is_lrq, redirect_readers, rotation_key
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def share_rotation(traced: TracedGraph) -> PassResult:
    result, first = PassResult(), {}
    rotations = [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]
    # An output keeps its name, so it is the one that stays.
    for node in sorted(rotations, key=lambda node: not is_graph_output(node.outputs[0], traced.graph)):
        key = rotation_key(node)
        if key is None:
            result.skip(node, "its signs are not a constant")
            continue
        leaders = first.setdefault(id(node.inputs[0]), {})
        leader = leaders.setdefault(key, node)
        if leader is node:
            if len(leaders) > 1:
                result.skip(node, "the same input is also rotated with another block or other signs")
            continue
        if is_graph_output(node.outputs[0], traced.graph):
            result.skip(node, "the rotated tensor is an output of the graph")
            continue
        redirect_readers(node.outputs[0], leader.outputs[0])
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result
