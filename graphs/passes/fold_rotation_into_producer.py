"""Fold a rotation into the linear layers that compute what it rotates.

    HadamardRotate(x Wᵀ + b)  =  x W'ᵀ + b'      with W' = Rᵀ W and b' = b R

The layers may be quantized or kept in floating point, and whatever leaves channels apart may stand between
(`graphs.passes.channels`). So the text embeddings that every cross-attention reads are rotated once and for all, in the
caption projection; and the rotation before an attention's output projection moves through the attention into the value
projection, or into both where text and image tokens attend to each other.
"""

from dataclasses import replace

import onnx_graphsurgeon as gs

from graphs.expressions import RotateOutput
from graphs.passes.channels import NoMatch, rows_behind
from graphs.passes.patterns import is_graph_output, is_lrq, redirect_readers
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def fold_rotation_into_producer(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for node in [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]:
        try:
            _check_rotation(node, traced)
            rows = rows_behind(node.inputs[0], int(node.attrs["block"]), traced)
            if len({each.name for each in rows}) < len(rows):
                raise NoMatch("two parts of one weight compute what it rotates")
        except NoMatch as reason:
            result.skip(node, str(reason))
            continue
        signs = traced.signs[node.inputs[1].name]
        step = RotateOutput(int(node.attrs["block"]), signs.seed, signs.equalizer)
        traced.rotate_outputs({each.name: replace(step, start=each.start, stop=each.stop) for each in rows})
        redirect_readers(node.outputs[0], node.inputs[0])
        node.inputs.clear()  # or it would count as a reader of what it rotated
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def _check_rotation(rotation: gs.Node, traced: TracedGraph) -> None:
    if rotation.inputs[1].name not in traced.signs:
        raise NoMatch("its signs are not in the table of signs")
    if is_graph_output(rotation.outputs[0], traced.graph):
        raise NoMatch("the rotated tensor is an output of the graph")
