"""Fold factors of channels into what modulates the norm before them.

    HadamardRotate<block = 1>(norm(x) * scale + shift, f)  ->  norm(x) * (scale f) + (shift f)

A rotation of block 1 multiplies channels by its signs f = ±1 / d alone: smoothing (SmoothQuant, arXiv 2211.10438) or
equalizing, with no rotation behind it. Scale and shift are one row per sample, or the weights of the norm, so nothing
is left to do for every token. Factors behind a linear layer fold into that (`fold_rotation_into_producer`).
"""

import onnx_graphsurgeon as gs

from graphs.passes.channels import NoMatch
from graphs.passes.norms import Norm, check_modulates, modulated_norm
from graphs.passes.patterns import is_graph_output, is_lrq, producer, redirect_readers, value_readers
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def fold_smoothing(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for node in [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate") and node.attrs["block"] == 1]:
        try:
            norm = modulated_norm(node.inputs[0])
            if norm is None:
                raise NoMatch("no norm computes what it multiplies")
            readers = _check(node, norm, traced)
        except NoMatch as reason:
            result.skip(node, str(reason))
            continue
        for place, (what, reader) in enumerate(readers):
            index = next(index for index, each in enumerate(reader.inputs) if each is what)
            reader.inputs[index] = _multiplied(what, node, place, traced.graph)
        redirect_readers(node.outputs[0], node.inputs[0])
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def _check(node: gs.Node, norm: Norm, traced: TracedGraph) -> list[tuple[gs.Tensor, gs.Node]]:
    """Scale and shift, as far as there are any, each with the node that reads it; raises NoMatch."""
    tokens, graph = node.inputs[0], traced.graph
    last = producer(tokens)
    steps = [last] if last.op != "Add" else [producer(each) for each in last.inputs if each is not norm.shift] + [last]
    if any(len(value_readers(step.outputs[0])) > 1 or is_graph_output(step.outputs[0], graph) for step in steps):
        raise NoMatch("the modulated norm is also read elsewhere, without these factors")
    if is_graph_output(node.outputs[0], graph):
        raise NoMatch("what it computes is an output of the graph")
    if norm.scale is None:
        raise NoMatch("the norm before it has no scale that could take them")
    check_modulates("scale", norm.scale, tokens)
    if norm.shift is None:
        return [(norm.scale, steps[0])]
    check_modulates("shift", norm.shift, tokens)
    return [(norm.scale, steps[0]), (norm.shift, last)]


def _multiplied(tensor: gs.Tensor, node: gs.Node, place: int, graph: gs.Graph) -> gs.Tensor:
    product = gs.Variable(f"{node.outputs[0].name}.{('scale', 'shift')[place]}", tensor.dtype, tensor.shape)
    graph.nodes.append(
        gs.Node("Mul", f"{node.name}.{('scale', 'shift')[place]}", {}, [tensor, node.inputs[1]], [product])
    )
    return product
