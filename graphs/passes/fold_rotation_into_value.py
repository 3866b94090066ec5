"""Fold the rotation before an attention output projection into the value projection.

    HadamardRotate<block>(merge_heads(P · split_heads(x Wᵀ + b)))  =  merge_heads(P · split_heads(x W'ᵀ + b'))

with W' = Rᵀ W and b' = b R: attention mixes tokens, never the channels of a head, so a rotation whose blocks lie within
heads commutes with it (P is any token-mixing matrix: softmax of self- or cross-attention, masked or not). split_heads
is Reshape (..., heads, width) then Transpose (0, 2, 1, 3); merge_heads is the reverse. Signs may differ between heads.
Everything on the path must have one reader: whoever else read it would find it rotated.
"""

import onnx_graphsurgeon as gs

from graphs.passes.folding import NoMatch, fold_rotations
from graphs.passes.patterns import OpenLinear, open_linear_ending_in, producer, sole_consumer
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph

SWAP_HEADS_AND_TOKENS = [0, 2, 1, 3]


def fold_rotation_into_value(traced: TracedGraph) -> PassResult:
    return fold_rotations(traced, value_projection)


def value_projection(rotation: gs.Node, traced: TracedGraph) -> OpenLinear:
    """Walk from a rotation up to the value projection that can absorb it; raises NoMatch with the reason."""
    graph = traced.graph
    merge = _step_up(rotation.inputs[0], "Reshape", graph)
    swap_back = _step_up(merge.inputs[0], "Transpose", graph)
    mix = _step_up(swap_back.inputs[0], "MatMul", graph)
    swap = _step_up(mix.inputs[1], "Transpose", graph)
    split = _step_up(swap.inputs[0], "Reshape", graph)
    for transpose in (swap, swap_back):
        if transpose.attrs.get("perm") != SWAP_HEADS_AND_TOKENS:
            raise NoMatch(f"a transpose permutes by {transpose.attrs.get('perm')}, needed {SWAP_HEADS_AND_TOKENS}")
    linear = open_linear_ending_in(split.inputs[0], graph)
    if linear is None:
        raise NoMatch("the value operand is not a quantized linear layer")
    _check_heads(linear, split.outputs[0], merge.outputs[0], int(rotation.attrs["block"]))
    if sole_consumer(linear.output, graph) is not split:
        raise NoMatch("the value projection is also read elsewhere")
    if not linear.owns_its_weight(graph):
        raise NoMatch("the value projection's weight is also read elsewhere")
    return linear


def _step_up(tensor: gs.Tensor, op: str, graph: gs.Graph) -> gs.Node:
    node = producer(tensor)
    found = "an input of the graph" if node is None else node.op
    if node is None or node.op != op:
        raise NoMatch(f"not behind an attention: {found} stands where an attention has its {op}")
    if sole_consumer(tensor, graph) is None:
        raise NoMatch(f"the output of {op} is also read elsewhere")
    return node


def _check_heads(linear: OpenLinear, split: gs.Tensor, merged: gs.Tensor, block: int) -> None:
    """linear (..., rows), split (batch, tokens, heads, width), merged (..., channels) must agree; block lie in a head.

    Row-major order then makes channel `head * width + i` of all three the same, whatever the leading axes are.
    """
    if split.shape is None or len(split.shape) != 4 or not all(isinstance(dim, int) for dim in split.shape[2:]):
        raise NoMatch(f"the head split has shape {split.shape}, needed (batch, tokens, heads, width) with fixed heads")
    heads, width = split.shape[2:]
    if not merged.shape or merged.shape[-1] != heads * width:
        raise NoMatch(f"the heads merge into shape {merged.shape}, needed {heads} x {width} channels last")
    if linear.dequant.attrs["rows"] != heads * width:
        raise NoMatch(f"the value projection has {linear.dequant.attrs['rows']} rows, needed {heads} x {width}")
    if width % block:
        raise NoMatch(f"blocks of {block} channels straddle heads of width {width}")
