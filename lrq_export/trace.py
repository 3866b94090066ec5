"""Export a diffusion transformer to ONNX without its weights.

The model is constructed and exported under fake tensors, so a graph of any size costs seconds and a few hundred
megabytes. Every planned linear layer becomes HadamardRotate -> MatMul(Transpose(TwinLogDequant(...))) + bias; every
weight becomes a graph input named after its source tensor, with a `graphs.expressions.Expression` that says what it
will be.
"""

import contextlib
import io
import logging
import re
import warnings
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import nn

from graphs import names
from graphs.expressions import Expression, RotateInput
from graphs.ops import packing
from graphs.ops.hadamard_rotate import rotation_attributes
from graphs.traced import LinearWeight, Signs, TracedGraph
from lrq_export.models.base import SAMPLES, InputSpec, ModelFamily
from lrq_export.plan import LayerPlan
from lrq_export.quant.rotation import Rotation

OUTPUT = "sample"
# The exporter specializes a dimension whose example is 1, and merges dimensions whose examples are equal: sizes in
# units of what each must be a multiple of; primes, so that no two are equal in any units.
EXAMPLE_BATCH, EXAMPLE_SIZES = 2, (23, 29, 31, 37)
WHOLE_LINEAR = "TracedLinear"  # a planned layer while it is one node: never in a graph that `trace` returns


class TracedLinear(nn.Module):
    """Stands for a planned linear layer while the model is traced, as one node that `_open_linears` takes apart.

    torch visits every node and every weight five times and takes milliseconds for each: planned layers written out
    were half of all nodes, and their codes, levels and scales most of the weights.
    """

    def __init__(self, name: str, rows: int, bias: nn.Parameter | None):
        super().__init__()
        self.name, self.rows, self.bias = name, rows, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operands = (x,) if self.bias is None else (x, self.bias)
        return torch.onnx.ops.symbolic(
            f"{names.DOMAIN}::{WHOLE_LINEAR}", operands, {"layer": self.name},
            dtype=torch.float32, shape=(*x.shape[:-1], self.rows), version=names.OPSET,
        )  # fmt: skip


class FlatInputs(nn.Module):
    """Takes the model's inputs as one positional list, so that the graph's inputs keep their names and order."""

    def __init__(self, model: nn.Module, family: ModelFamily, input_names: list[str]):
        super().__init__()
        self.model, self.family, self.input_names = model, family, input_names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.family.call(self.model, dict(zip(self.input_names, tensors, strict=True)))


def trace(family: ModelFamily, config: dict[str, Any], plans: list[LayerPlan]) -> TracedGraph:
    """Export the model of `config` with the planned layers in the dialect and all weights as placeholders."""
    specs = family.inputs(config)
    proto = export_model(family, config, {plan.name: plan.rows for plan in plans})
    graph = gs.import_onnx(proto)
    graph.name = "denoiser"
    traced = TracedGraph(graph, {f"{plan.name}.codes": _linear_weight(plan) for plan in plans})
    kept = [tensor for tensor in graph.inputs if tensor.name not in specs]
    _open_linears(traced, plans)
    traced.tensors |= {tensor.name: Expression(tensor.name, tuple(tensor.shape)) for tensor in kept}
    traced.forget_unused()
    return traced


def export_model(family: ModelFamily, config: dict[str, Any], layers: dict[str, int]) -> onnx.ModelProto:
    """The model of `config`, of its inputs and its weights, with each of `layers` (name -> rows) as one `WHOLE_LINEAR`.

    It depends on nothing else that a plan says, and takes most of the time of a trace.
    """
    from torch._subclasses import FakeTensorMode

    specs = family.inputs(config)
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        model = _fake_parameters(family.construct(config))
        for name, rows in layers.items():
            model.set_submodule(name, TracedLinear(name, rows, model.get_submodule(name).bias))
        family.make_traceable(model)  # after the replacement: it may hook the very layers that were replaced
        examples, dynamic = _examples(specs)
        wrapped = FlatInputs(model, family, list(specs))
        program = torch.export.export(wrapped, examples, dynamic_shapes=(dynamic,), strict=False)
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=names.ONNX_OPSET, optimize=False,
            input_names=list(specs), output_names=[OUTPUT], verbose=False,
        )  # fmt: skip
    return _to_proto(exported.model, specs)


def _fake_parameters(model: nn.Module) -> nn.Module:
    """Parameters were constructed on the meta device, which the exporter refuses to mix with CPU inputs."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
    return model


def _examples(specs: dict[str, InputSpec]) -> tuple[tuple[torch.Tensor, ...], tuple[dict, ...]]:
    """Example inputs, and for each the dynamic dimensions by axis."""
    sizes = iter(EXAMPLE_SIZES)
    free: dict[str, tuple[int, Any]] = {SAMPLES: (EXAMPLE_BATCH, torch.export.Dim(SAMPLES))}
    examples, dynamic = [], []
    for spec in specs.values():
        for extent in spec.shape:
            if isinstance(extent, str) and extent not in free:
                unit, most = spec.unit(extent), spec.most_units(extent)
                dim = torch.export.Dim(f"{extent}_units" if unit > 1 else extent, max=most)
                units = next(sizes) if most is None else min(next(sizes), most - len(free))
                free[extent] = units * unit, unit * dim if unit > 1 else dim
        examples.append(torch.empty([free[extent][0] if isinstance(extent, str) else extent for extent in spec.shape]))
        dynamic.append({axis: free[extent][1] for axis, extent in enumerate(spec.shape) if isinstance(extent, str)})
    return tuple(examples), tuple(dynamic)


@contextlib.contextmanager
def _quiet():
    """The exporter prints its progress and warns about torchvision; neither means anything to a user."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)


def _to_proto(model, specs: dict[str, InputSpec]) -> onnx.ModelProto:
    """Simplify the exporter's model, an onnx_ir one whose initializers are fake: these become inputs."""
    import onnx_ir

    prefix = "model."  # FlatInputs holds the model under this name
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(prefix):
            del model.graph.initializers[name]
            value.const_value, value.name = None, name.removeprefix(prefix)
            model.graph.inputs.append(value)
    _simplify(model)
    proto = onnx_ir.to_proto(model)
    for entity in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del entity.metadata_props[:]  # stack traces of this machine
    _name_dimensions(proto, specs)
    return proto


def _simplify(model) -> None:
    """Fold constants, take out what hands on its input as it is, and merge what is computed twice.

    This is `onnxscript.optimizer.optimize(model, inline=False)` without most of its rewrite rules. One of them, which
    looks for pairs of Slices that are a Split, goes over the whole graph at every node, so that it took longer than all
    else for a deep model; it finds nothing, since the exporter writes a chunk as a Split. The others left out are about
    clipping, padding, batch normalization and biases of convolutions, which no diffusion transformer has.
    """
    from onnx_ir.passes import common as ir_passes
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    clean_up = (
        *rules.mul_by_1_rule.commute(), *rules.add_0_rule.commute(), rules.div_by_1_rule, rules.sub_0_rule,
        rules.no_op_cast_rule, rules.cast_cast_rule, rules.no_op_expand_rule, rules.unsqueeze_unsqueeze_rule,
        rules.no_op_transpose_rule, rules.transpose_transpose_rule, rules.collapse_slice_rule,
        rules.collapse_slice2_rule, rules.reshape_reshape_rule, rules.squeeze_reshape_1d_rule,
        rules.materialize_reshape_shape_rule,
    )  # fmt: skip
    for _ in range(2):  # a size that a rule has made constant lets more be folded
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, clean_up)
    for finish in (
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir_passes.DeduplicateInitializersPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.OutputFixPass(),
        ir_passes.NameFixPass(),
    ):
        finish(model)


def _open_linears(traced: TracedGraph, plans: list[LayerPlan]) -> None:
    """Write each planned layer out: y = HadamardRotate(x, signs) · Transpose(TwinLogDequant(codes, ...)) + bias.

    A layer that the model calls twice keeps one weight, so that passes see all that reads it.
    """
    graph, by_name, signs = traced.graph, {plan.name: plan for plan in plans}, _shared_signs(traced, plans)
    nodes, weights = [], {}

    def append(op: str, name: str, shape, inputs: list[gs.Tensor], domain: str | None = None, **attrs) -> gs.Variable:
        y = gs.Variable(name, np.float32, shape)
        nodes.append(gs.Node(op, name, attrs, inputs, [y], domain))
        return y

    for node in graph.nodes:
        if (node.domain, node.op) != (names.DOMAIN, WHOLE_LINEAR):
            nodes.append(node)
            continue
        plan, (x, *bias), (y,) = by_name[node.attrs["layer"]], node.inputs, node.outputs
        node.inputs.clear()
        node.outputs.clear()
        if plan.block:
            attrs = rotation_attributes(plan.block)
            # A layer that is called twice rotates two tensors; near misses name the rotation by the layer.
            name = f"{plan.name}.rotated" if plan.name not in weights else f"{plan.name}.{y.name}.rotated"
            x = append("HadamardRotate", name, x.shape, [x, signs[plan.name]], names.DOMAIN, **attrs)
        if plan.name not in weights:
            op, placeholders, attrs = _dequant(plan)
            graph.inputs.extend(placeholders)
            shape = [plan.rows, plan.cols]
            weight = append(op, f"{plan.name}.dequantized", shape, placeholders, names.DOMAIN, **attrs)
            weights[plan.name] = append("Transpose", f"{plan.name}.transposed", shape[::-1], [weight], perm=[1, 0])
        product = append("MatMul", f"{y.name}.product", y.shape, [x, weights[plan.name]])
        if bias:
            product = append("Add", f"{y.name}.biased", y.shape, [product, *bias])
        product.inputs[0].outputs = [y]
    graph.nodes = nodes


def _dequant(plan: LayerPlan) -> tuple[str, list[gs.Variable], dict[str, int]]:
    """The op that decodes the weight of a layer, placeholders for what it reads, and its attributes."""

    def placeholder(role: str, dtype: type, *shape: int) -> gs.Variable:
        return gs.Variable(f"{plan.name}.{role}", dtype, shape)

    size, scale = {"rows": plan.rows, "cols": plan.cols}, placeholder("scale", np.float32, plan.rows)
    if plan.bits == names.INT8_BITS:
        return "Int8Dequant", [placeholder("codes", np.int8, plan.rows, plan.cols), scale], size
    codes = placeholder("codes", np.int8, *packing.layout(plan.bits).shape(plan.rows, plan.cols))
    groups, coding = plan.cols // plan.group_size, {"bits": plan.bits, "group_size": plan.group_size}
    if plan.method == names.CODEBOOK:
        table = placeholder("table", np.int8, plan.rows, groups, 2**plan.bits)
        return "CodebookDequant", [codes, table, scale], coding | size
    exponents = placeholder("exponents", np.int8, plan.rows, groups, 2, 3)
    fixed_point = {"fraction_bits": names.FRACTION_BITS, "integer_bits": names.INTEGER_BITS}
    return "TwinLogDequant", [codes, exponents, scale], coding | fixed_point | size


def _name_dimensions(proto: onnx.ModelProto, specs: dict[str, InputSpec]) -> None:
    """Give the exporter's symbols the names of the specs: s12 becomes text, 2*s47 becomes 2*height_units."""
    meaning = {}
    for value in proto.graph.input:
        if value.name not in specs:
            continue
        for dim, extent in zip(value.type.tensor_type.shape.dim, specs[value.name].shape, strict=True):
            if isinstance(extent, str):
                symbol = re.fullmatch(r"(?:\d+\*)?(\w+)", dim.dim_param).group(1)
                meaning[symbol] = f"{extent}_units" if "*" in dim.dim_param else extent
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: meaning.get(found.group(), found.group()), dim.dim_param)


def _linear_weight(plan: LayerPlan) -> LinearWeight:
    weight = Expression(f"{plan.name}.weight", (plan.rows, plan.cols))
    if plan.block:
        weight = weight.then(RotateInput(plan.block, plan.signs_seed, plan.equalizer))
    return LinearWeight(plan.name, weight, plan.bits, plan.group_size, plan.act_bits)


def _shared_signs(traced: TracedGraph, plans: list[LayerPlan]) -> dict[str, gs.Constant]:
    """Signs for each rotated layer, one constant for each width and origin: equal rotations are seen equal."""
    constants: dict[tuple[int, Signs], gs.Constant] = {}
    by_layer = {}
    for plan in plans:
        if plan.block:
            signs = Signs(plan.signs_seed, plan.equalizer)
            if (plan.cols, signs) not in constants:
                name = _signs_name(plan)
                factors = Rotation(plan.cols, plan.block, plan.signs_seed, plan.equalizer).factors
                constants[plan.cols, signs] = gs.Constant(name, factors.float().numpy())
                traced.signs[name] = signs
            by_layer[plan.name] = constants[plan.cols, signs]
    return by_layer


def _signs_name(plan: LayerPlan) -> str:
    """Divisors belong to one input: the first layer that reads it lends its name."""
    if plan.equalizer is not None:
        return f"signs.{plan.name}"
    return f"signs.{plan.cols}" if plan.signs_seed is None else f"signs.{plan.cols}.{plan.signs_seed}"
