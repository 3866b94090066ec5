"""Fold a rotation into the linear layer that computes what it rotates.

    HadamardRotate(x Wᵀ + b)  =  x W'ᵀ + b'      with W' = Rᵀ W and b' = b R

The layer may be quantized or kept in floating point, and its output reshaped or transposed on the way, as long as the
channels stay the last axis. So the text embeddings that every cross-attention reads are rotated once and for all, in
the caption projection. Everything on the path must have one reader: whoever else read it would find it rotated.
"""

import onnx_graphsurgeon as gs

from graphs.expressions import RotateOutput
from graphs.passes.patterns import (
    float_linear,
    is_graph_output,
    is_lrq,
    open_linear_ending_in,
    producer,
    redirect_readers,
    sole_consumer,
)
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


class NoMatch(Exception):
    """No linear layer can take the rotation; the text says why."""


def fold_rotation_into_producer(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for node in [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]:
        try:
            weight, bias = _taker(node, traced)
        except NoMatch as reason:
            result.skip(node, str(reason))
            continue
        signs = traced.signs[node.inputs[1].name]
        traced.rotate_output(weight, bias, RotateOutput(int(node.attrs["block"]), signs.seed, signs.equalizer))
        redirect_readers(node.outputs[0], node.inputs[0])
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def _taker(rotation: gs.Node, traced: TracedGraph) -> tuple[str, str | None]:
    """The weight, by its codes if it is quantized, and the bias of the layer that can absorb a rotation."""
    graph, tensor = traced.graph, rotation.inputs[0]
    if rotation.inputs[1].name not in traced.signs:
        raise NoMatch("its signs are not in the table of signs")
    if is_graph_output(rotation.outputs[0], graph):
        raise NoMatch("the rotated tensor is an output of the graph")
    while (made := producer(tensor)) is not None and _keeps_channels(made):
        if sole_consumer(tensor, graph) is None:
            raise NoMatch(f"the output of {made.op} is also read elsewhere")
        tensor = made.inputs[0]
    quantized = open_linear_ending_in(tensor, graph)
    linear = quantized or float_linear(tensor, graph, traced.tensors)
    if linear is None:
        raise NoMatch(
            f"{'an input of the graph' if made is None else made.op} computes what it rotates, no linear layer"
        )
    if sole_consumer(tensor, graph) is None:
        raise NoMatch("the linear layer before it is also read elsewhere")
    if quantized is not None and not quantized.owns_its_weight(graph):
        raise NoMatch("the weight of the linear layer before it is also read elsewhere")
    bias = linear.bias
    if bias is not None and (bias.name not in traced.tensors or len(bias.outputs) != 1):
        raise NoMatch("the bias of the linear layer before it is not a weight of its own")
    return (quantized.codes.name if quantized is not None else linear.weight.name), None if bias is None else bias.name


def _keeps_channels(node: gs.Node) -> bool:
    """Whether a node only moves tokens about: row-major order then keeps every channel in its place."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if node.op == "Transpose":
        return node.attrs.get("perm", [])[-1:] == [len(node.attrs.get("perm", [])) - 1]
    if node.op == "Reshape":
        return bool(before and after) and isinstance(after[-1], int) and before[-1] == after[-1]
    return False
