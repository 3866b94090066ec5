"""Rewrite MatMul(x, Transpose(TwinLogDequant(...))) + bias into one TwinLogLinear, and likewise for its siblings.

From here on the product is integer: x is quantized per token inside the node. A layer whose activations stay in
floating point (act_bits 16) keeps its MatMul. The new node is named after its layer.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphs import names
from graphs.passes.patterns import (
    DEQUANT_OPS,
    LINEAR_OF,
    OpenLinear,
    is_inner,
    is_lrq,
    is_standard,
    open_linear,
    redirect_shapes,
    value_readers,
)
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def make_linear(traced: TracedGraph) -> PassResult:
    result, graph = PassResult(), traced.graph
    for dequant in [node for node in graph.nodes if is_lrq(node, *DEQUANT_OPS)]:
        weight = traced.linears[dequant.inputs[0].name]
        if weight.act_bits == names.FLOATING_POINT:
            result.skip(dequant, "its activations stay in floating point")
            continue
        readers = _readers(dequant.outputs[0])
        linear = open_linear(readers[0], graph) if len(readers) == 1 else None
        if linear is None or linear.dequant is not dequant:
            result.skip(
                dequant, f"its weight is read by {_said(readers, graph)}, needed one MatMul of tokens by its transpose"
            )
            continue
        bias = linear.bias
        if bias is None and any(_is_bias(reader, linear) for reader in value_readers(linear.output)):
            result.skip(dequant, "its bias stays apart: the product before it is also read elsewhere")
        if bias is None:
            rows = int(dequant.attrs["rows"])
            bias = gs.Constant(f"{weight.layer}.no_bias", np.zeros(rows, np.float32))
        graph.nodes.append(
            gs.Node(
                op=LINEAR_OF[dequant.op],
                domain=names.DOMAIN,
                name=weight.layer,
                attrs=dict(dequant.attrs) | {"act_bits": weight.act_bits, "rotation": "none", "block": 0},
                inputs=[linear.input, *dequant.inputs, bias],
                outputs=[_take_output(linear)],
            )
        )
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def _readers(weight: gs.Tensor) -> list[gs.Node]:
    """What reads a weight, or its transpose."""
    direct = [[node] if node.op != "Transpose" else node.outputs[0].outputs for node in weight.outputs]
    return [node for each in direct for node in each]


def _said(readers: list[gs.Node], graph: gs.Graph) -> str:
    """`a Relu, and 2 nodes in branches`: what reads a weight, in words."""
    outside = [reader.op for reader in readers if not is_inner(reader, graph)]
    inside = len(readers) - len(outside)
    ops = ", ".join(outside) or "nothing in the graph itself"
    return f"{ops}, and by {inside} in branches" if inside else ops


def _is_bias(node: gs.Node, linear: OpenLinear) -> bool:
    """Whether a node adds one number for each channel to the product of a layer."""
    if not is_standard(node, "Add"):
        return False
    added = [each for each in node.inputs if each is not linear.output]
    return [list(each.shape or ()) for each in added if not each.inputs] == [[linear.dequant.attrs["rows"]]]


def _take_output(linear: OpenLinear) -> gs.Tensor:
    """Detach the layer's output from the nodes that computed it so far, for the new node to own."""
    output = linear.output
    if linear.bias_add is not None:
        redirect_shapes(linear.matmul.outputs[0], output)
    (linear.bias_add or linear.matmul).outputs.clear()
    return output
