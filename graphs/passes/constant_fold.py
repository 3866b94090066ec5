"""Compute ahead of time what depends on constants alone.

Only standard ops: weights are placeholders, and the constants that an lrq op reads are a part of it. The sizes that are
known of a tensor whose shape is asked for are constants too.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphs import names
from graphs.passes.patterns import computed_by, is_graph_output, is_standard
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph

RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
LARGEST = 1 << 20  # bytes of a folded constant: enough for a position embedding, and no file doubles


def constant_fold(traced: TracedGraph) -> PassResult:
    graph = traced.graph
    nodes = [node for node in graph.nodes if node.outputs]
    # What computes an output stays, since it keeps its name; what reads signs stays, since `graphs.online` finds by it
    # the channels that are equalized.
    kept = {tensor.name for tensor in graph.outputs} | traced.signs.keys()

    def stays(node: gs.Node) -> bool:
        held = any(tensor.name in kept for tensor in (*node.inputs, *node.outputs))
        return held or _is_lrq(node) or is_standard(node, *RANDOM)

    result, folded = PassResult(), -1
    while folded < result.fired:  # a size that is picked by a computed index is known once the index is
        folded = result.fired
        _fold_sizes(graph)
        # Not its own folding of shapes: that takes fractions of sizes for whole numbers (onnx-graphsurgeon 0.6.1).
        graph.fold_constants(
            fold_shapes=False, recurse_subgraphs=False, flatten_subgraphs=False, size_threshold=LARGEST,
            should_exclude_node=stays,
        )  # fmt: skip
        result.fired = sum(not node.outputs for node in nodes)  # a node whose outputs are constants has none left
    traced.forget_unused()
    for node in graph.nodes:
        if node.inputs and not _is_lrq(node) and all(isinstance(each, gs.Constant) for each in node.inputs):
            if any(each.name in traced.signs for each in node.inputs):
                continue
            why = f"is larger than {LARGEST} bytes, an output of the graph, or could not be computed"
            result.skip(node, f"{node.op} of constants {why}")
    return result


def _fold_sizes(graph: gs.Graph) -> None:
    """Let the known sizes that a Shape, or a Gather or Slice behind one, asks for be constants."""
    asks = {"Shape": _sizes, "Gather": _gathered, "Slice": _sliced}
    for node in graph.nodes:
        if not node.outputs or not is_standard(node, *asks) or is_graph_output(node.outputs[0], graph):
            continue
        sizes = asks[node.op](node)
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
    sizes = _sizes_behind(gather)
    return None if sizes is None else np.array(sizes, object)[gather.inputs[1].values]


def _sliced(cut: gs.Node) -> list | None:
    """The sizes that a Slice takes of a Shape; None if it does not."""
    sizes = _sizes_behind(cut)
    if sizes is None:
        return None
    start, stop, *_, step = [int(each.values.item()) for each in cut.inputs[1:]] + [1] * (len(cut.inputs) < 5)
    return sizes[start:stop:step]  # Python's rules for what lies outside are ONNX's


def _sizes_behind(node: gs.Node) -> list | None:
    """What the Shape asks for that computes a node's first input; None if none does, or another is no constant."""
    shape = computed_by(node.inputs[0], "Shape")
    if shape is None or not all(isinstance(each, gs.Constant) for each in node.inputs[1:]):
        return None
    return _sizes(shape)


def _is_lrq(node: gs.Node) -> bool:
    return node.domain == names.DOMAIN
