"""Compute ahead of time what depends on constants alone.

Only standard ops: weights are placeholders, and the constants that an lrq op reads are a part of it. The sizes that are
known of a tensor whose shape is asked for are constants too.
"""

import onnx_graphsurgeon as gs

from graphs import names
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph

LARGEST = 1 << 20  # bytes of a folded constant: enough for a position embedding, and no file doubles


def constant_fold(traced: TracedGraph) -> PassResult:
    graph, before = traced.graph, len(traced.graph.nodes)
    graph.fold_constants(size_threshold=LARGEST, should_exclude_node=_is_lrq)
    traced.forget_unused()
    result = PassResult(before - len(graph.nodes))
    for node in graph.nodes:
        if node.inputs and not _is_lrq(node) and all(isinstance(each, gs.Constant) for each in node.inputs):
            result.skip(node, f"{node.op} of constants is larger than {LARGEST} bytes, or could not be computed")
    return result


def _is_lrq(node: gs.Node) -> bool:
    return node.domain == names.DOMAIN
