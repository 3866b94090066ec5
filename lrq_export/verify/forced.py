"""Compare two models that round, without letting one rounding flip cascade.

A per-token INT8 layer turns an input difference of 1e-7 into one of a whole step wherever a value lies next to a
rounding boundary, and the next layer sees that. Run freely, two correct float32 implementations of one quantized model
drift apart to about 1e-6 NMSE (docs/graph.md), which would hide a small fault. So every quantized layer is given the
*reference's* input, and what the graph itself computes there is compared instead: each part of the graph is exercised,
between layers and within them, and a fault shows at the tensor where it happens.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch
from torch import nn

from graphs.passes.patterns import LINEAR_OPS, is_lrq
from graphs.traced import TracedGraph
from lrq_export.models.base import ModelFamily
from lrq_export.quant.linear import QuantizedLinear
from lrq_export.verify.array_file import ArrayFile
from lrq_export.verify.metrics import nmse
from lrq_export.verify.sliced import ReadInput, SlicedModel

OUTPUT = "sample"
HALF_TYPES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
FORCED = ".forced"  # suffix of the graph inputs that stand in for the inputs of quantized layers


def layer_inputs(traced: TracedGraph) -> dict[str, str]:
    """For every layer with an integer product the name of the tensor it reads; model.onnx and the engine keep these."""
    return {
        weight.layer: node.inputs[0].name
        for node in traced.graph.nodes
        if is_lrq(node, *LINEAR_OPS)
        for weight in traced.linear_parts(node.inputs[1].name)
    }


@torch.no_grad()
def torch_answers(
    family: ModelFamily, model: nn.Module, inputs: dict[str, torch.Tensor], tensor_of: Mapping[str, str]
) -> ArrayFile:
    """Run the quantized torch model; by tensor name, what each of its layers reads (after its rotation), and OUTPUT."""
    answers = ArrayFile()

    def watch(tensor_name: str):
        def hook(module: QuantizedLinear, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            answers[tensor_name] = (x if module.rotation is None else module.rotation.apply(x)).numpy()

        return hook

    # Layers that read one tensor are watched at the first.
    first_reader = {name: layer for layer, name in reversed(tensor_of.items())}
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(watch(name)) for name, layer in first_reader.items()
    ]
    try:
        answers[OUTPUT] = family.call(model, inputs).numpy()
    finally:
        for handle in handles:
            handle.remove()
    return answers


def cut_model(model: onnx.ModelProto, tensor_names: set[str]) -> None:
    """Edit `model`: every reader of these tensors reads a new graph input instead; the tensors become outputs.

    Both are float32, also where the model computes in half precision.
    """
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in tensor_names:
                node.input[index] = name + FORCED
    for name in sorted(tensor_names):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name + FORCED, onnx.TensorProto.FLOAT, None))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    held = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    _cast_cuts(model.graph, {name: held[name] for name in tensor_names if held.get(name) in HALF_TYPES})


def _cast_cuts(graph: onnx.GraphProto, held: Mapping[str, int]) -> None:
    """Put a Cast on both sides of the cuts at these tensors, which are of the types `held`."""
    if not held:
        return
    inner = {name: f"{name}.half" for name in held} | {name + FORCED: f"{name}{FORCED}.half" for name in held}
    nodes = [
        onnx.helper.make_node("Cast", [name + FORCED], [inner[name + FORCED]], to=held[name]) for name in sorted(held)
    ]
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        cast = [name for name in node.output if name in held]
        node.output[:] = [inner.get(name, name) for name in node.output]
        nodes.append(node)
        nodes += [onnx.helper.make_node("Cast", [inner[name]], [name], to=onnx.TensorProto.FLOAT) for name in cast]
    known = [value for value in graph.value_info if value.name not in held]
    for field, kept in ((graph.node, nodes), (graph.value_info, known)):
        kept = [type(each).FromString(each.SerializeToString()) for each in kept]
        del field[:]
        field.extend(kept)


def forced_inputs(fed: Mapping[str, np.ndarray], answers: Mapping[str, np.ndarray]) -> ReadInput:
    """The inputs of a cut model: the model's own as `fed`, and for each cut tensor what `answers` holds."""

    def read(name: str) -> np.ndarray:
        return fed[name] if name in fed else answers[name.removesuffix(FORCED)]

    return read


def worst_difference(
    cut: SlicedModel, cases: Sequence[ReadInput], answers: Sequence[Mapping[str, np.ndarray]]
) -> tuple[float, str]:
    """The largest NMSE over all outputs of the cut model in all cases, and the name of that tensor."""
    return max((nmse(array, answers[case][name]), name) for case, name, array in cut.run(cases))
