"""Compare two models that round, without letting one rounding flip cascade.

A per-token INT8 layer turns an input difference of 1e-7 into one of a whole step wherever a value lies next to a
rounding boundary, and the next layer sees that. Run freely, two correct float32 implementations of one quantized model
drift apart to about 1e-6 NMSE (docs/graph.md), which would hide a small fault. So every quantized layer is given the
*reference's* input, and what the graph itself computes there is compared instead: each part of the graph is exercised,
between layers and within them, and a fault shows at the tensor where it happens.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from graphs import names
from graphs.passes.patterns import LINEAR_OPS
from lrq_export.models.base import InputSpec, ModelFamily
from lrq_export.quant.linear import QuantizedLinear
from lrq_export.runtime import feeds
from lrq_export.verify.metrics import nmse
from lrq_export.verify.sessions import frugal_options

FORCED = ".forced"  # suffix of the graph inputs that stand in for the inputs of quantized layers
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Answers:
    """What a model computed: its output, and by tensor name the input of every quantized layer."""

    output: np.ndarray
    layer_inputs: dict[str, np.ndarray]


def layer_inputs(portable: onnx.ModelProto) -> dict[str, str]:
    """For every quantized layer of model.onnx the name of the tensor it reads; the engine keeps these names."""
    linears = [node for node in portable.graph.node if node.domain == names.DOMAIN and node.op_type in LINEAR_OPS]
    return {node.input[1].removesuffix(".codes"): node.input[0] for node in linears}


@torch.no_grad()
def torch_answers(
    family: ModelFamily, model: nn.Module, inputs: dict[str, torch.Tensor], tensor_of: dict[str, str]
) -> Answers:
    """Run the quantized torch model, noting what each of its layers reads (after its rotation)."""
    seen: dict[str, np.ndarray] = {}

    def watch(tensor_name: str):
        def hook(module: QuantizedLinear, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            seen[tensor_name] = (x if module.rotation is None else module.rotation.apply(x)).numpy()

        return hook

    handles = [model.get_submodule(layer).register_forward_pre_hook(watch(name)) for layer, name in tensor_of.items()]
    try:
        output = family.call(model, inputs).numpy()
    finally:
        for handle in handles:
            handle.remove()
    return Answers(output, seen)


class ForcedSession:
    """An ONNX model whose quantized layers read what they are told, and which reports what they would have read."""

    def __init__(self, path: Path, tensor_names: list[str], config: dict[str, str]):
        import onnxruntime

        model = onnx.load(path, load_external_data=False)
        cut_model(model, tensor_names)
        options = frugal_options()
        for key, value in (config | {FOLDER_OPTION: str(path.parent)}).items():
            options.add_session_config_entry(key, value)
        self.tensor_names = tensor_names
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, specs: dict[str, InputSpec], inputs: dict[str, torch.Tensor], forced: Answers) -> Answers:
        given = {name + FORCED: forced.layer_inputs[name] for name in self.tensor_names}
        output, *rest = self.session.run(None, feeds(specs, inputs) | given)
        return Answers(output, dict(zip(self.tensor_names, rest, strict=True)))


def cut_model(model: onnx.ModelProto, tensor_names: list[str]) -> None:
    """Edit `model`: every reader of these tensors reads a new graph input instead; the tensors become outputs."""
    wanted = set(tensor_names)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in wanted:
                node.input[index] = name + FORCED
    for name in tensor_names:
        model.graph.input.append(onnx.helper.make_tensor_value_info(name + FORCED, onnx.TensorProto.FLOAT, None))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))


def worst_difference(got: Answers, reference: Answers) -> tuple[float, str]:
    """The largest NMSE over the output and all layer inputs, and the tensor where it is."""
    errors = {name: nmse(got.layer_inputs[name], each) for name, each in reference.layer_inputs.items()}
    errors["sample"] = nmse(got.output, reference.output)
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst
