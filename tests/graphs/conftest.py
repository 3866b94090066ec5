"""Traced graphs written as ONNX text, and their function in floating point.

Three shorthands stand for what a trace writes in many lines; the layer is named after its output:

    y = Linear<rows = 24, cols = 24>(x)      y_w = lrq.TwinLogDequant(...)  y_wt = Transpose(y_w)
                                             y_open = MatMul(x, y_wt)       y = Add(y_open, y_bias)
    y = Kept<rows = 24, cols = 24>(x)        the same, with a weight y_weight in floating point
    r = Rotate<block = 12, seed = 7>(x)      r = lrq.HadamardRotate<block = 12, ...>(x, signs)

Linear also takes bits (4; 8 is Int8Dequant), codebook (0; 1 is CodebookDequant), act_bits (8), bias (1) and bias_first
(0); Kept also takes bias; Rotate also takes equalized (0; another number draws divisors of the channels). A linear that
reads a Rotate gets the rotated weight, so that rotations never change the function of a graph; Plain in place of Rotate
is the same network without that rotation.
"""

import zlib
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from graphs import names
from graphs.equalizer import encode
from graphs.expressions import Expression, RotateInput
from graphs.float_model import float_model, weight_names
from graphs.ops import OPS, packing, register
from graphs.ops.hadamard_rotate import rotation_attributes
from graphs.traced import LinearWeight, Signs, TracedGraph
from lrq_export.evaluate import evaluate
from lrq_export.quant.rotation import hadamard_signs
from lrq_export.verify.metrics import nmse

SIZES = (
    {"batch": 1, "tokens": 1, "text": 1},
    {"batch": 2, "tokens": 5, "text": 3},
    {"batch": 3, "tokens": 16, "text": 7},
)
FLOAT, INT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8


def header(opset: int) -> str:
    return f'<ir_version: {names.IR_VERSION}, opset_import: ["": {opset}, "lrq": {names.OPSET}]>\n'


@pytest.fixture(scope="session")
def parse() -> Callable[[str], TracedGraph]:
    """ONNX text with the shorthands, and perhaps a newer opset, -> TracedGraph with shapes inferred."""
    register()
    return lambda text, opset=names.ONNX_OPSET: _Expansion(onnx.parser.parse_model(header(opset) + text)).traced()


@pytest.fixture(scope="session")
def weights() -> Callable[[TracedGraph], dict[str, np.ndarray]]:
    """Random weights to feed the float model of a graph: source tensors depend on their name alone."""
    return lambda traced: {name: evaluate(each, _source(traced)).numpy() for name, each in weight_names(traced).items()}


@pytest.fixture(scope="session")
def difference(weights) -> Callable[..., float]:
    """(before, after) -> the largest NMSE of any output over several sizes, in float32 ONNX Runtime.

    `corrupt` may edit the weights of `after`.
    """

    def measure(before: TracedGraph, after: TracedGraph, corrupt: Callable[[dict], None] = lambda fed: None) -> float:
        fed = weights(after)
        corrupt(fed)
        runs = zip(_run(before, weights(before)), _run(after, fed), strict=True)
        return max(nmse(got, reference) for reference, got in runs)

    return measure


def _run(traced: TracedGraph, fed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = float_model(traced).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs = []
    for seed, sizes in enumerate(SIZES):
        rng = np.random.default_rng(seed)
        shapes = {each.name: [sizes.get(dim, dim) for dim in each.shape] for each in traced.model_inputs()}
        feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        outputs += session.run(None, feeds | fed)
    return outputs


def _source(traced: TracedGraph) -> Callable[[str], torch.Tensor]:
    tables = [weight.weight for weight in traced.linears.values()] + list(traced.tensors.values())
    shapes = {each.source: each.source_shape for each in tables}

    def read(name: str) -> torch.Tensor:
        spread = shapes[name][-1] ** -0.5 if len(shapes[name]) > 1 else 0.5
        return torch.randn(shapes[name], generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * spread

    return read


class _Expansion:
    """One model in shorthand, and what its expansion adds to it."""

    def __init__(self, model: onnx.ModelProto):
        self.model, self.linears, self.tensors, self.signs = model, {}, {}, {}
        self.rotations: dict[str, RotateInput] = {}

    def traced(self) -> TracedGraph:
        graph = self.model.graph
        nodes = [expanded for node in graph.node for expanded in self._expand(node)]
        del graph.node[:]
        graph.node.extend(nodes)
        for index, node in enumerate(graph.node):
            node.name = node.name or f"{node.op_type}.{index}"
        inferred = onnx.shape_inference.infer_shapes(self.model, check_type=True, strict_mode=True, data_prop=True)
        traced = TracedGraph(gs.import_onnx(inferred), self.linears, self.tensors, self.signs)
        traced.forget_unused()
        return traced

    def _expand(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Rotate":
            return [self._rotate(node.input[0], node.output[0], **values)]
        if node.op_type == "Plain":
            return [helper.make_node("Identity", node.input, node.output)]
        if node.op_type == "Kept":
            return self._kept(node.input[0], node.output[0], **values)
        if node.op_type == "Linear":
            return self._linear(node.input[0], node.output[0], **values)
        return [node]

    def _rotate(self, x, y, block, width=24, seed=None, equalized=0) -> onnx.NodeProto:
        equalizer = encode(np.random.default_rng(equalized).uniform(0.2, 5, width)) if equalized else None
        signs = Signs(seed, equalizer)
        name = f"signs{width}" + (f"_{seed}" if seed is not None else "") + (f"_e{equalized}" if equalized else "")
        if name not in self.signs:
            values = np.ones(width, np.float32) if seed is None else hadamard_signs(width, seed).numpy()
            self.model.graph.initializer.append(numpy_helper.from_array(values * signs.magnitudes(width), name))
            self.signs[name] = signs
        self.rotations[y] = RotateInput(block, seed, equalizer)
        return OPS["HadamardRotate"].node([x, name], [y], name=f"rotate.{y}", **rotation_attributes(block))

    def _kept(self, x, y, rows, cols, bias=1) -> list[onnx.NodeProto]:
        for part, shape in (("weight", (rows, cols)), ("bias", (rows,)))[: 1 + bias]:
            self.model.graph.input.append(helper.make_tensor_value_info(f"{y}_{part}", FLOAT, shape))
            self.tensors[f"{y}_{part}"] = Expression(f"{y}.{part}", shape)
        return [
            helper.make_node("Transpose", [f"{y}_weight"], [f"{y}_wt"], perm=[1, 0]),
            helper.make_node("MatMul", [x, f"{y}_wt"], [f"{y}_open" if bias else y]),
            *([helper.make_node("Add", [f"{y}_open", f"{y}_bias"], [y])] if bias else []),
        ]

    def _linear(self, x, y, rows, cols, bits=4, codebook=0, act_bits=8, bias=1, bias_first=0) -> list[onnx.NodeProto]:
        op = "Int8Dequant" if bits == 8 else "CodebookDequant" if codebook else "TwinLogDequant"
        shape = (rows, cols) if bits == 8 else packing.layout(bits).shape(rows, cols)
        levels = {"exponents": (INT8, (rows, 1, 2, 3)), "table": (INT8, (rows, 1, 2**bits))}
        shapes = {"codes": (INT8, shape), "scale": (FLOAT, (rows,))} | levels
        packed = [f"{y}.{tensor.name}" for tensor in OPS[op].inputs]
        for name in packed:
            self.model.graph.input.append(helper.make_tensor_value_info(name, *shapes[name.rpartition(".")[2]]))
        expression = Expression(f"{y}.weight", (rows, cols))
        if x in self.rotations:
            expression = expression.then(self.rotations[x])
        self.linears[packed[0]] = LinearWeight(y, expression, bits, cols, act_bits)
        attributes = {"rows": rows, "cols": cols} | ({} if bits == 8 else {"bits": bits, "group_size": cols})
        if bias:
            self.model.graph.input.append(helper.make_tensor_value_info(f"{y}_bias", FLOAT, (rows,)))
            self.tensors[f"{y}_bias"] = Expression(f"{y}.bias", (rows,))
        operands = [f"{y}_bias", f"{y}_open"] if bias_first else [f"{y}_open", f"{y}_bias"]
        return [
            OPS[op].node(packed, [f"{y}_w"], **attributes),
            helper.make_node("Transpose", [f"{y}_w"], [f"{y}_wt"], perm=[1, 0]),
            helper.make_node("MatMul", [x, f"{y}_wt"], [f"{y}_open" if bias else y]),
            *([helper.make_node("Add", operands, [y])] if bias else []),
        ]
