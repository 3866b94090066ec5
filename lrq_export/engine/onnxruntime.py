"""The ONNX Runtime engine: the same model with weights decoded to INT8 ahead of time and real integer products.

    TwinLogLinear(x, ...)  ->  q = uint8(round(x / s) + 128), s per token;  MatMulIntegerToFloat(q, wᵀ, zero point 128)

ONNX Runtime multiplies unsigned activations by signed weights 12 times as fast as signed by signed where the processor
has VNNI. Where it has none, that product saturates in 16 bits and is *wrong*: the session option
`session.x64quantprecision` makes it exact there. Elsewhere it would cost more than half of the speed, so it is set only
where a product of known sum comes out wrong.
"""

import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphs.passes.fuse_epilogue import open_epilogues
from graphs.passes.patterns import PLAIN_LINEAR_OPS, is_lrq, sole_consumer
from graphs.traced import TracedGraph
from lrq_export.bind import coded_weights, float_weight
from lrq_export.engine.attention import CONTRIB, fuse_attention
from lrq_export.engine.session_settings import EXACT_PRODUCTS, FOLD_BODIES, STOP_SPINNING, SessionSettings
from lrq_export.errors import InputError
from lrq_export.onnx_file import WeightTensor, write_model
from lrq_export.quantized import QuantizedFile

MODEL = "model.onnx"
ZERO_POINT = 128
_KERNEL = "_kernel_time"  # ends the names of nodes in ONNX Runtime's profiles
SMALLEST = np.finfo(np.float32).tiny  # stands in for the scale of an all-zero token, whose codes are then all zero


def build_engine(
    traced: TracedGraph, quantized: QuantizedFile, folder: Path, *, threads: tuple[int, int] = (0, 0), **options
) -> int:
    """Write engine/onnxruntime/model.onnx and session.json. Returns the bytes of its weights.

    `threads`: intra_op and inter_op of its sessions, 0 as ONNX Runtime chooses; `options`: of `write_model`.
    """
    lowered = traced.copy()
    layers = lower_linears(lowered)
    fuse_attention(lowered.graph)
    lowered.forget_unused()
    model = lowered.to_onnx()
    if not any(entry.domain == CONTRIB for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
    total = write_model(folder / MODEL, model, engine_weights(lowered, quantized, layers), **options)
    # Without an integer product the option has nothing to do, and ONNX Runtime 1.31 fails to load 2-bit bodies with it.
    exact = EXACT_PRODUCTS if layers else {}
    bodies = [FOLD_BODIES] if lowered.codes_inputs() else []  # of layers whose activations stay in floating point
    intra_op, inter_op = threads
    SessionSettings(dict([STOP_SPINNING, *bodies]), exact, intra_op_threads=intra_op, inter_op_threads=inter_op).write(
        folder
    )
    return total


def open_session(folder: Path, threads: int | None = None, *, profile: Path | None = None):
    """An `onnxruntime.InferenceSession` of the engine as its session.json says, but for the `threads` of one run.

    `profile`: begin of the name of a file of ONNX Runtime's own, to which `end_profiling` writes what each node took.
    """
    import onnxruntime

    settings = SessionSettings.read(folder)
    options = settings.session_options(products_saturate(), threads)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    providers = [name for name in settings.providers if name in onnxruntime.get_available_providers()]
    try:
        # Of the CPU there is nothing to fall back from; ONNX Runtime would print that it does.
        fallback = int(len(providers) > 1)
        return onnxruntime.InferenceSession(str(folder / MODEL), options, providers=providers, enable_fallback=fallback)
    except Exception as error:  # its own kinds, and UnicodeDecodeError where its message quotes a damaged name
        raise InputError(
            f"{folder / MODEL}: ONNX Runtime {onnxruntime.__version__} refuses it: {error}", hint="build it again"
        ) from error


def layer_times(folder: Path, feeds: dict[str, Any], runs: int, threads: int | None = None) -> dict[str, list[float]]:
    """Milliseconds of each node of the engine's optimized graph, one for each of `runs`; named `name (op)`.

    What the session does between two nodes is in none of them. Of a node on a GPU it is what handing it over takes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(folder, threads, profile=Path(scratch) / "profile")
        for _ in range(runs + 1):  # the first warms up
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            name = f"{event['name'].removesuffix(_KERNEL)} ({event['args']['op_name']})"
            times.setdefault(name, []).append(event["dur"] / 1000)
    return {name: each[1:] for name, each in times.items()}


def session_config(folder: Path) -> dict[str, str]:
    """The session options that the engine needs to be exact on this processor."""
    return dict(SessionSettings.read(folder).where_products_saturate) if products_saturate() else {}


@functools.cache
def products_saturate() -> bool:
    """Whether ONNX Runtime's uint8 x int8 product is wrong on this processor, found by asking it for one.

    64 products of 255 and 127 fit an int32 easily; a kernel that adds pairs of them in 16 bits returns about half.
    """
    import onnxruntime

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "probe",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [8, 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [8, 32])],
        [onnx.numpy_helper.from_array(np.full((64, 32), 127, np.int8), "w")],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"x": np.full((8, 64), 255, np.uint8)})
    return bool((sums != 64 * 255 * 127).any())


def lower_linears(traced: TracedGraph) -> list[str]:
    """Replace every TwinLogLinear and its siblings by standard and contrib ops; returns the names of their layers.

    Layers that read one input share its quantization. Those that were merged become products of their own again: on a
    CPU a wider product gains nothing, and the Split behind it copies all that it made.
    """
    open_epilogues(traced)
    graph, quantized_inputs, layers = traced.graph, {}, []
    for node in [node for node in graph.nodes if is_lrq(node, *PLAIN_LINEAR_OPS)]:
        x, act_bits = node.inputs[0], int(node.attrs["act_bits"])
        key = (id(x), act_bits)
        for layer in _layers(node, traced):
            if key not in quantized_inputs:
                quantized_inputs[key] = _quantize_tokens(graph, x, act_bits, f"{layer.name}.x")
            _integer_product(graph, layer, *quantized_inputs[key])
            layers.append(layer.name)
    traced.forget_unused()
    return layers


@dataclass(frozen=True)
class _Layer:
    """One layer of a linear node, and the tensor that its product shall be."""

    name: str
    shape: tuple[int, int]  # of its weight (rows, cols)
    scale: gs.Tensor
    bias: gs.Tensor
    output: gs.Tensor


def _layers(node: gs.Node, traced: TracedGraph) -> list[_Layer]:
    """The layers of a linear node, detached from it and from the Split of what was merged."""
    codes, (scale, bias), graph = node.inputs[1].name, node.inputs[-2:], traced.graph
    weights = traced.linear_parts(codes)
    reader = sole_consumer(node.outputs[0], graph)
    if codes not in traced.stacks or reader is None or reader.op != "Split":
        (output,) = node.outputs
        node.outputs.clear()
        rows_and_cols = (int(node.attrs["rows"]), int(node.attrs["cols"]))
        return [_Layer(codes.removesuffix(".codes"), rows_and_cols, scale, bias, output)]
    outputs = list(reader.outputs)
    reader.outputs.clear()
    layers = []
    for index, (weight, output) in enumerate(zip(weights, outputs, strict=True)):
        shape = weight.weight.shape
        own_scale = gs.Variable(weight.tensor("scale"), np.float32, shape[:1])
        if bias.name in traced.stacks:
            own_bias = gs.Variable(traced.parts(bias.name)[index], np.float32, shape[:1])
            graph.inputs.append(own_bias)
        else:
            own_bias = gs.Constant(f"{weight.layer}.no_bias", np.zeros(shape[0], np.float32))
        graph.inputs.append(own_scale)
        layers.append(_Layer(weight.layer, shape, own_scale, own_bias, output))
    return layers


def _quantize_tokens(graph: gs.Graph, x: gs.Tensor, act_bits: int, prefix: str) -> tuple[gs.Variable, gs.Variable]:
    """uint8 codes around 128, (..., cols), and the scale of each token, (..., 1).

    Few passes over x: its peak comes from two reductions that write next to nothing, and one QuantizeLinear rounds half
    to even, shifts by 128 and narrows.
    """

    def constant(name: str, value) -> gs.Constant:
        return gs.Constant(f"{prefix}.{name}", np.asarray(value))

    def step(name: str, op: str, *inputs, **attrs) -> gs.Variable:
        output = gs.Variable(f"{prefix}.{name}", np.float32)
        graph.nodes.append(gs.Node(op, f"{prefix}.{name}", attrs, list(inputs), [output]))
        return output

    axis = constant("axis", np.array([-1]))
    lowest = step("lowest", "ReduceMin", x, axis, keepdims=1)
    peak = step("peak", "Max", step("highest", "ReduceMax", x, axis, keepdims=1), step("depth", "Neg", lowest))
    limit = constant("limit", np.float32(2 ** (act_bits - 1) - 1))
    token_scale = step("scale", "Max", step("quotient", "Div", peak, limit), constant("tiny", np.float32(SMALLEST)))
    one, zero_point = constant("one", np.float32(1)), constant("zero_point", np.array(ZERO_POINT, np.uint8))
    codes = step("codes", "QuantizeLinear", step("steps", "Div", x, token_scale), one, zero_point)
    codes.dtype = np.uint8
    return codes, token_scale


def _integer_product(graph: gs.Graph, layer: _Layer, codes: gs.Variable, token_scale: gs.Variable) -> None:
    """y = (codes - 128) wᵀ · row_scale · token_scale + bias, into the layer's output."""
    name, (rows, cols) = layer.name, layer.shape
    weight = gs.Variable(f"{name}.int8", np.int8, (cols, rows))
    graph.inputs.append(weight)
    one = gs.Constant(f"{name}.unit", np.array(1, np.float32))
    zero_point = gs.Constant(f"{name}.zero_point", np.array(ZERO_POINT, np.uint8))
    in_rows, in_tokens = (gs.Variable(f"{name}.{part}", np.float32) for part in ("in_rows", "in_tokens"))
    graph.nodes += [
        gs.Node(
            "MatMulIntegerToFloat", f"{name}.product", {}, [codes, weight, one, layer.scale, zero_point], [in_rows],
            domain=CONTRIB,
        ),
        gs.Node("Mul", f"{name}.Tokens", {}, [in_rows, token_scale], [in_tokens]),
        gs.Node("Add", f"{name}.Bias", {}, [in_tokens, layer.bias], [layer.output]),
    ]  # fmt: skip


def engine_weights(traced: TracedGraph, quantized: QuantizedFile, layers: list[str]) -> Iterator[WeightTensor]:
    """Every weight of a graph that `lower_linears` lowered, `layers` being what that returned."""
    for name in layers:
        record = quantized.records[name]
        shape = (record.cols, record.rows)

        def read(name=name) -> bytes:
            return np.ascontiguousarray(quantized.layer(name).integer_weight().numpy().T).tobytes()

        yield WeightTensor(f"{name}.int8", onnx.TensorProto.INT8, shape, record.rows * record.cols, read)
        yield WeightTensor.of(f"{name}.scale", quantized.read(f"{name}.scale").numpy())
    for codes in traced.codes_inputs():  # activations in floating point: these keep their codes and bodies
        yield from coded_weights(traced, quantized, codes)
    for name in traced.float_inputs():
        yield float_weight(traced, quantized, name)
