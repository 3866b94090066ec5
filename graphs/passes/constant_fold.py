"""Compute ahead of time what depends on constants alone.

Only standard ops: weights are placeholders, and the constants that an lrq op reads are a part of it. The sizes that are
known of a tensor whose shape is asked for are constants too.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphs import names
from graphs.passes.patterns import computed_by, is_standard
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph

LARGEST = 1 << 20  # bytes of a folded constant: enough for a position embedding, and no file doubles


def constant_fold(traced: TracedGraph) -> PassResult:
    graph = traced.graph
    nodes = [node for node in graph.nodes if node.outputs]
    _fold_sizes(graph)
    # What computes an output stays, since it keeps its name; what reads signs stays, since `graphs.online` finds by it
    # the channels that are equalized.
    kept = {tensor.name for tensor in graph.outputs} | traced.signs.keys()
    # Not its own folding of shapes: that takes fractions of sizes for whole numbers (onnx-graphsurgeon 0.6.1).
    graph.fold_constants(
        fold_shapes=False, recurse_subgraphs=False, flatten_subgraphs=False, size_threshold=LARGEST,
        should_exclude_node=lambda node: _is_lrq(node) or any(t.name in kept for t in (*node.inputs, *node.outputs)),
    )  # fmt: skip
    result = PassResult(sum(not node.outputs for node in nodes))  # a node whose outputs are constants has none left
    traced.forget_unused()
    for node in graph.nodes:
        if node.inputs and not _is_lrq(node) and all(isinstance(each, gs.Constant) for each in node.inputs):
            if any(each.name in traced.signs for each in node.inputs):
                continue
            why = f"is larger than {LARGEST} bytes, an output of the graph, or could not be computed"
            result.skip(node, f"{node.op} of constants {why}")
    return result


def _fold_sizes(graph: gs.Graph) -> None:
    """Let the known sizes that a Shape, or a Gather behind one, asks for be constants."""
    for node in graph.nodes:
        if not is_standard(node, "Shape", "Gather") or any(node.outputs[0] is each for each in graph.outputs):
            continue
        sizes = _sizes(node) if node.op == "Shape" else _gathered(node)
        if sizes is not None and all(isinstance(size, int) for size in np.ravel(sizes).tolist()):
            (output,) = node.outputs
            output.to_constant(np.array(sizes, np.int64))
            output.inputs.clear()


def _sizes(shape: gs.Node) -> list | None:
    """What a Shape node asks for, numbers and names; None where not even the rank is known."""
    sizes = shape.inputs[0].shape
    return None if sizes is None else list(sizes)[shape.attrs.get("start", 0) : shape.attrs.get("end")]


def _gathered(gather: gs.Node):
    """The sizes that a Gather picks of a Shape, in the shape of its indices; None if it does not."""
    shape = computed_by(gather.inputs[0], "Shape")
    sizes = None if shape is None else _sizes(shape)
    if sizes is None or not isinstance(gather.inputs[1], gs.Constant) or gather.attrs.get("axis", 0) != 0:
        return None
    return np.array(sizes, object)[gather.inputs[1].values]


def _is_lrq(node: gs.Node) -> bool:
    return node.domain == names.DOMAIN
