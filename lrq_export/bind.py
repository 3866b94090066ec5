"""Quantize and bind: evaluate each weight expression, quantize it in its own basis, put it into the rewritten graph.

Layer by layer, each stored as soon as it is done: a killed build goes on at the next layer. At no time are the
floating-point weights of the model in memory together.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from graphs import names
from graphs.expressions import RotateOutput
from graphs.online import online_channels
from graphs.ops import detach_bodies, inline_bodies, packing
from graphs.passes.patterns import LINEAR_OPS, is_lrq, numpy_type, open_linear, operand
from graphs.traced import LinearWeight, TracedGraph
from lrq_export.calibrate.observed import Observed
from lrq_export.checkpoint import Checkpoint, TensorFile, check_finite
from lrq_export.evaluate import evaluate
from lrq_export.onnx_file import WeightTensor, write_model
from lrq_export.package import save_tensors_atomic
from lrq_export.plan import LayerPlan
from lrq_export.quant import uniform
from lrq_export.quant.bias_correction import corrected_bias
from lrq_export.quant.compensate import Feedback, quantize_compensated
from lrq_export.quant.formats import QUANTIZERS
from lrq_export.quant.transforms.base import in_basis
from lrq_export.quant.weight import dequantize
from lrq_export.quantized import (
    FOLDED,
    LEVELS,
    ONLINE,
    UNROTATED,
    LayerRecord,
    LayerTensors,
    QuantizedFile,
    as_bytes,
    onnx_float,
    write_quantized,
)


def quantize_layers(
    traced: TracedGraph,
    plans: list[LayerPlan],
    checkpoint: Checkpoint,
    observed: Observed,
    folder: Path,
    done: Callable[[str], None] = lambda layer: None,
    *,
    bias_correction: bool = True,
) -> None:
    """Quantize every linear of the rewritten graph into `folder`, one file a layer; files already there are kept.

    Where `observed` holds no E[x xᵀ], weights go to the nearest level. With `bias_correction`, rounding moves no
    layer's mean output on the calibration inputs (Nagel et al. 2019). `done` is told each layer's name, for progress.
    Raises InputError for weights that are NaN or Inf.
    """
    plan_of = {plan.name: plan for plan in plans}

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.read(name)
        check_finite(name, tensor)
        return tensor

    for codes, weight in traced.linears.items():
        path = layer_file(folder, weight.layer)
        if not path.exists():
            record = _record(traced, codes, weight, plan_of[weight.layer])
            mean, second_moment, correlation = moments_of(observed, record)
            exact = evaluate(weight.weight, read)
            layer, floats = quantize_layer(exact, second_moment, record, correlation), {}
            if bias_correction and record.bias is not None:
                bias = evaluate(traced.tensors[record.bias], read)
                floats[record.bias] = corrected_bias(bias, exact - dequantize(layer), mean)
            write_quantized(path, [layer], floats)
        done(weight.layer)
    floats = folder / "floats.safetensors"
    if not floats.exists():
        save_tensors_atomic(floats, {name: evaluate(each, read) for name, each in traced.tensors.items()})


def quantize_layer(
    weight: torch.Tensor,
    second_moment: torch.Tensor | None,
    record: LayerRecord,
    correlation: torch.Tensor | None = None,
) -> LayerTensors:
    """Quantize W (rows, cols) as `record` says, weighting columns by E[x²] (cols,); fills in the errors.

    Given E[x xᵀ] (cols, cols), codes are chosen for the least output error; at 8 bits rounding is fine enough as it is.
    """
    if record.bits == names.INT8_BITS:
        quantized = uniform.quantize(weight, second_moment)
        layer = LayerTensors(record, quantized.codes, quantized.scale)
    else:
        layer = _quantize_to_codes(weight, second_moment, record, correlation)
    error, power = (dequantize(layer) - weight).double().square(), weight.double().square()
    importance = torch.ones(record.cols) if second_moment is None else second_moment
    importance = importance.double()
    measured = {
        "weight_nmse": _ratio(error.sum(), power.sum()),
        "weighted_nmse": _ratio((error @ importance).sum(), (power @ importance).sum()),
    }
    return replace(layer, record=replace(record, **measured))


def _quantize_to_codes(
    weight: torch.Tensor, second_moment: torch.Tensor | None, record: LayerRecord, correlation: torch.Tensor | None
) -> LayerTensors:
    """Levels by the record's method and the nearest codes, or given E[x xᵀ] those of the least output error."""
    quantize, role = QUANTIZERS[record.method], LEVELS[record.method]
    fit = partial(quantize, bits=record.bits, group_size=record.group_size)
    if correlation is None:
        quantized = fit(weight, second_moment)
    else:
        quantized = quantize_compensated(weight, Feedback(correlation), fit)
    packed = as_bytes(packing.pack(quantized.codes.numpy(), record.bits))
    return LayerTensors(record, packed, quantized.scale, **{role: getattr(quantized, role)})


def assemble(traced: TracedGraph, folder: Path, path: Path) -> None:
    """Join the per-layer files of `quantize_layers` into the package's quantized.safetensors."""
    floats, layers = TensorFile(folder / "floats.safetensors").read_all(), []
    for weight in traced.linears.values():
        file = QuantizedFile(layer_file(folder, weight.layer))
        layers.append(file.layer(weight.layer))
        floats |= {name: file.read(name) for name in file.float_names()}  # biases that were corrected
    write_quantized(path, layers, floats)


def write_portable(traced: TracedGraph, quantized: QuantizedFile, path: Path, **options) -> int:
    """Write model.onnx: the rewritten graph with its codes, bodies attached. Returns the bytes of its weights."""
    return write_model(path, traced.to_onnx(), portable_weights(traced, quantized), **options)


def write_for_plugins(traced: TracedGraph, quantized: QuantizedFile, path: Path, **options) -> int:
    """Write the graph of a target whose plugins run every lrq node: no bodies, codes as each node reads them."""
    weights = portable_weights(traced, quantized)
    return write_model(path, traced.to_onnx(), weights, complete=detach_bodies, **options)


def write_standard(traced: TracedGraph, quantized: QuantizedFile, path: Path, **options) -> int:
    """Write the rewritten graph in standard ops alone: for TensorRT without plugins, which imports no body twice."""
    weights = portable_weights(traced, quantized)
    return write_model(path, traced.to_onnx(), weights, complete=inline_bodies, **options)


def portable_weights(traced: TracedGraph, quantized: QuantizedFile) -> Iterator[WeightTensor]:
    """Every weight of the graph, by its name there, codes in the layout that their node asks for."""
    for codes in traced.codes_inputs():
        yield from coded_weights(traced, quantized, codes)
    for name in traced.float_inputs():
        yield float_weight(traced, quantized, name)


def coded_weights(traced: TracedGraph, quantized: QuantizedFile, codes: str) -> list[WeightTensor]:
    """The packed tensors that a node reads with its `codes`: of one layer, or of several below each other."""
    layout = _layout(traced, codes)
    layers = [quantized.layer(weight.layer).onnx_weights(layout) for weight in traced.linear_parts(codes)]
    if codes not in traced.stacks:
        return layers[0]
    stack_of = {parts: name for name, parts in traced.stacks.items()}
    return [
        WeightTensor.stacked(stack_of[tuple(part.name for part in parts)], parts) for parts in zip(*layers, strict=True)
    ]


def _layout(traced: TracedGraph, codes: str) -> str:
    """How the node that reads `codes` wants them to lie."""
    held = next(tensor for tensor in traced.graph.inputs if tensor.name == codes)
    return held.outputs[0].attrs.get("layout", names.STORAGE)


def float_weight(traced: TracedGraph, quantized: QuantizedFile, name: str) -> WeightTensor:
    """A tensor kept in floating point, or several below each other, in the type that the graph declares."""
    parts = [quantized.read(part) for part in traced.parts(name)]
    held = next(tensor for tensor in traced.graph.inputs if tensor.name == name)
    return onnx_float(name, torch.cat(parts) if len(parts) > 1 else parts[0], numpy_type(held))


def layer_file(folder: Path, layer: str) -> Path:
    return folder / f"{layer}.safetensors"


def _record(traced: TracedGraph, codes: str, weight: LinearWeight, plan: LayerPlan) -> LayerRecord:
    """What the rewritten graph made of a planned layer."""
    (start, stop), bias = _surroundings(traced, codes)
    folded = [step for step in weight.weight.maps if isinstance(step, RotateOutput)]
    rotated_by = UNROTATED if not plan.block else ONLINE if stop else FOLDED
    in_part = rotated_by == ONLINE and (start, stop) != (0, plan.cols)
    return LayerRecord(
        layer=weight.layer, rows=weight.weight.shape[0], cols=weight.weight.shape[1], bits=weight.bits,
        group_size=weight.group_size, act_bits=weight.act_bits, block=plan.block, signs_seed=plan.signs_seed,
        rotated_by=rotated_by, reason=plan.reason,
        output_rotations=[asdict(step) for step in folded],
        bias=bias, method=plan.method, equalizer=plan.equalizer, online_channels=[start, stop] if in_part else None,
    )  # fmt: skip


def _surroundings(traced: TracedGraph, codes: str) -> tuple[tuple[int, int], str | None]:
    """The input channels of a quantized linear that nodes rotate, and the name of its bias, None without one."""
    held = next(name for name in traced.codes_inputs() if codes in traced.parts(name))
    reader = next(node for node in traced.graph.nodes if any(tensor.name == held for tensor in node.inputs))
    if is_lrq(reader, *LINEAR_OPS):
        x, bias = reader.inputs[0], operand(reader, "bias")
    else:  # activations in floating point: Dequant -> Transpose -> MatMul
        linear = open_linear(reader.outputs[0].outputs[0].outputs[0].outputs[0], traced.graph)
        x, bias = linear.input, linear.bias
    online = online_channels(x, traced)
    if bias is None:
        return online, None
    if bias.name in traced.stacks:
        return online, traced.parts(bias.name)[traced.parts(held).index(codes)]
    return online, bias.name if bias.name in traced.tensors else None


def moments_of(observed: Observed, record: LayerRecord) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """E[x], E[x²] (cols,) float64 and E[x xᵀ] (cols, cols), if collected, of a layer's input in its weight's basis."""
    moments, correlation = observed.statistics.layer(record.layer), observed.correlation(record.layer)
    rotation = record.rotation()
    if rotation is None:
        return moments.mean, moments.second_moment, correlation
    mean = rotation.apply(moments.mean)
    if correlation is None:
        return mean, rotation.apply(observed.tokens(record.layer)).double().square().mean(0), None
    correlation = in_basis(correlation.double(), rotation)
    return mean, correlation.diagonal(), correlation


def _ratio(error: torch.Tensor, power: torch.Tensor) -> float:
    return float(error / power) if power > 0 else 0.0
