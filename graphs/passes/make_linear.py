"""Rewrite MatMul(x, Transpose(TwinLogDequant(...))) + bias into one TwinLogLinear, and likewise for its siblings.

From here on the product is integer: x is quantized per token inside the node. A layer whose activations stay in
floating point (act_bits 16) keeps its MatMul. The new node is named after its layer.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphs import names
from graphs.passes.patterns import DEQUANT_OPS, LINEAR_OF, is_inner, is_lrq, open_linear, redirect_shapes
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def make_linear(traced: TracedGraph) -> PassResult:
    result, graph = PassResult(), traced.graph
    for dequant in [node for node in graph.nodes if is_lrq(node, *DEQUANT_OPS)]:
        weight = traced.linears[dequant.inputs[0].name]
        if weight.act_bits == names.FLOATING_POINT:
            result.skip(dequant, "its activations stay in floating point")
            continue
        readers = [matmul for transpose in dequant.outputs[0].outputs for matmul in transpose.outputs[0].outputs]
        linear = open_linear(readers[0], graph) if len(readers) == 1 else None
        if linear is None or linear.dequant is not dequant:
            inner = any(is_inner(reader, graph) for reader in readers)
            read = f"{len(readers)} nodes{', in a branch' if inner else ''}"
            result.skip(
                dequant, f"its weight is read by {read}, needed one MatMul by its transpose in the graph itself"
            )
            continue
        bias = linear.bias
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


def _take_output(linear) -> gs.Tensor:
    """Detach the layer's output from the nodes that computed it so far, for the new node to own."""
    output = linear.output
    if linear.bias_add is not None:
        redirect_shapes(linear.matmul.outputs[0], output)
    (linear.bias_add or linear.matmul).outputs.clear()
    return output
