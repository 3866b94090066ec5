"""What the passes share that fold a rotation into the weight of an earlier layer."""

from collections.abc import Callable

import onnx_graphsurgeon as gs

from graphs.expressions import RotateOutput
from graphs.passes.patterns import FloatLinear, OpenLinear, is_graph_output, is_lrq, redirect_readers
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


class NoMatch(Exception):
    """No layer can take the rotation; the text says why."""


Find = Callable[[gs.Node, TracedGraph], OpenLinear | FloatLinear]


def fold_rotations(traced: TracedGraph, find: Find) -> PassResult:
    """Fold every rotation into the layer that `find` names for it, which raises NoMatch if there is none."""
    result = PassResult()
    for node in [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]:
        try:
            _check_rotation(node, traced)
            linear = find(node, traced)
            _check_bias(linear, traced)
        except NoMatch as reason:
            result.skip(node, str(reason))
            continue
        signs = traced.signs[node.inputs[1].name]
        step = RotateOutput(int(node.attrs["block"]), signs.seed, signs.equalizer)
        traced.rotate_output(linear.weight.name, None if linear.bias is None else linear.bias.name, step)
        redirect_readers(node.outputs[0], node.inputs[0])
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def _check_rotation(rotation: gs.Node, traced: TracedGraph) -> None:
    if rotation.inputs[1].name not in traced.signs:
        raise NoMatch("its signs are not in the table of signs")
    if is_graph_output(rotation.outputs[0], traced.graph):
        raise NoMatch("the rotated tensor is an output of the graph")


def _check_bias(linear: OpenLinear | FloatLinear, traced: TracedGraph) -> None:
    bias = linear.bias
    if bias is not None and (bias.name not in traced.tensors or len(bias.outputs) != 1):
        raise NoMatch("the layer's bias is not a weight of its own")
