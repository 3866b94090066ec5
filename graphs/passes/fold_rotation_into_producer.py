"""Fold a rotation into the linear layer that computes what it rotates.

    HadamardRotate(x Wᵀ + b)  =  x W'ᵀ + b'      with W' = Rᵀ W and b' = b R

The layer may be quantized or kept in floating point, and its output reshaped or transposed on the way, as long as the
channels stay the last axis. So the text embeddings that every cross-attention reads are rotated once and for all, in
the caption projection. Everything on the path must have one reader: whoever else read it would find it rotated.
"""

import onnx_graphsurgeon as gs

from graphs.passes.folding import NoMatch, fold_rotations
from graphs.passes.patterns import FloatLinear, OpenLinear, float_linear, open_linear_ending_in, producer, sole_consumer
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def fold_rotation_into_producer(traced: TracedGraph) -> PassResult:
    return fold_rotations(traced, linear_before)


def linear_before(rotation: gs.Node, traced: TracedGraph) -> OpenLinear | FloatLinear:
    """The linear layer whose output is rotated; raises NoMatch with the reason why none can absorb that."""
    graph, tensor = traced.graph, rotation.inputs[0]
    while (made := producer(tensor)) is not None and _keeps_channels(made):
        if sole_consumer(tensor, graph) is None:
            raise NoMatch(f"the output of {made.op} is also read elsewhere")
        tensor = made.inputs[0]
    linear = open_linear_ending_in(tensor, graph) or float_linear(tensor, graph)
    if linear is None:
        found = "an input of the graph" if made is None else made.op
        raise NoMatch(f"{found} computes what it rotates, no linear layer")
    if linear.weight.name not in traced.linears | traced.tensors:
        raise NoMatch("the weight of the linear layer before it is not in the tables of weights")
    if sole_consumer(tensor, graph) is None:
        raise NoMatch("the linear layer before it is also read elsewhere")
    if not linear.owns_its_weight(graph):
        raise NoMatch("the weight of the linear layer before it is also read elsewhere")
    return linear


def _keeps_channels(node: gs.Node) -> bool:
    """Whether a node only moves tokens about: row-major order then keeps every channel in its place."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if node.op == "Transpose":
        perm = node.attrs.get("perm", [])
        return perm[-1:] == [len(perm) - 1]
    if node.op == "Reshape":
        return bool(before and after) and isinstance(after[-1], int) and before[-1] == after[-1]
    return False
