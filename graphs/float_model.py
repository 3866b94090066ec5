"""The traced graph in floating point, its weights fed at run time: what a pass must not change (parity rung R3).

    TwinLogDequant(codes, ...) and its siblings          ->  W                      W is the input `<codes>.float`
    TwinLogLinear(x, codes, ..., bias) and its siblings  ->  MatMul(x, Wᵀ) + bias   x is not quantized
    TwinLogLinearResidual(x, ..., gate, residual)        ->  that times gate, plus residual

Rotations stay and keep their bodies, so one that was folded wrongly shows. Weights are graph inputs, not initializers:
protobuf ends at 2 GiB, and whoever runs the model may evaluate each weight when it is needed.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphs import names
from graphs.expressions import Expression
from graphs.ops import attach_bodies
from graphs.passes.fuse_epilogue import open_epilogues
from graphs.passes.patterns import DEQUANT_OPS, PLAIN_LINEAR_OPS, is_lrq, redirect_readers
from graphs.traced import TracedGraph


def float_name(codes: str) -> str:
    """The input of the float model that takes the weight (rows, cols) whose codes tensor is `codes`."""
    return f"{codes}.float"


def weight_names(traced: TracedGraph) -> dict[str, Expression]:
    """What the float model of `traced` is fed beside the model's own inputs: input name -> its weight, as float32."""
    named = {float_name(codes): traced.expression(codes) for codes in traced.codes_inputs()}
    return named | {name: traced.expression(name) for name in traced.float_inputs()}


def float_model(traced: TracedGraph) -> onnx.ModelProto:
    """The function of `traced` without any quantization, for stock ONNX Runtime; `traced` stays as it is.

    Its inputs are the model's own, then those of `weight_names`, of the shapes of their expressions. Raises ValueError
    for a rotation fused into a linear node, which only a plugin target may hold.
    """
    floating = traced.copy()
    graph = floating.graph
    weights = {
        codes: gs.Variable(float_name(codes), np.float32, traced.expression(codes).shape)
        for codes in traced.codes_inputs()
    }
    for node in [node for node in graph.nodes if is_lrq(node, *DEQUANT_OPS)]:
        redirect_readers(node.outputs[0], weights[node.inputs[0].name])
    open_epilogues(floating)
    for node in [node for node in graph.nodes if is_lrq(node, *PLAIN_LINEAR_OPS)]:
        _open(graph, node, weights[node.inputs[1].name])
    floats = set(traced.float_inputs())
    kept = [tensor for tensor in graph.inputs if tensor.name in floats]
    graph.inputs = [*floating.model_inputs(), *kept, *weights.values()]
    floating.forget_unused()
    model = gs.export_onnx(graph)
    model.ir_version = names.IR_VERSION
    return attach_bodies(model)


def _open(graph: gs.Graph, node: gs.Node, weight: gs.Variable) -> None:
    """Let MatMul(x, Transpose(W)) + bias compute what the linear `node` did, but for the quantization."""
    if node.attrs.get("rotation", "none") != "none":
        raise ValueError(f"{node.op} {node.name!r}: rotation {node.attrs['rotation']!r} is fused, needed 'none'")
    x, bias, outputs = node.inputs[0], node.inputs[-1], list(node.outputs)
    node.outputs.clear()
    transposed, product = (gs.Variable(f"{weight.name}.{part}", np.float32) for part in ("transposed", "product"))
    graph.nodes += [
        gs.Node("Transpose", f"{node.name}.transpose", {"perm": [1, 0]}, [weight], [transposed]),
        gs.Node("MatMul", f"{node.name}.matmul", {}, [x, transposed], [product]),
        gs.Node("Add", f"{node.name}.add", {}, [product, bias], outputs),
    ]
