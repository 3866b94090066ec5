"""Time the ONNX Runtime engine on the CPU beside its baselines, all in one process, turn by turn; ratios of medians.

    python tools/bench_cpu.py [--threads 2] [--runs 15] [--only linear|block]

linear: 1024 tokens, 1152 -> 4608. block: a PixArt-XL/2 of one block (1152 wide, 1024 tokens, batch 2, 120 text tokens).
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import make_pixart_xl
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

import lrq_export
from graphs.expressions import Expression
from graphs.ops.hadamard_rotate import rotation_attributes
from graphs.passes.make_linear import make_linear
from graphs.traced import LinearWeight, TracedGraph
from lrq_export.bind import quantize_layer
from lrq_export.engine import onnxruntime as engine
from lrq_export.machine import describe_machine
from lrq_export.onnx_file import write_model
from lrq_export.quant.rotation import Rotation
from lrq_export.quantized import LayerRecord, QuantizedFile, onnx_float, write_quantized
from lrq_export.runtime import feeds
from lrq_export.source import open_source
from lrq_export.trace import trace
from lrq_export.verify.metrics import nmse

TOKENS, COLS, ROWS = 1024, 1152, 4608
PROFILED_RUNS = 7
Run = Callable[[], np.ndarray]


def timed(runs: dict[str, Run], count: int) -> dict[str, float]:
    """Median milliseconds of each, after one warm-up, taking turns so that a slow moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(count + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: float(np.median(each)) for name, each in times.items()}


def show(title: str, runs: dict[str, Run], count: int, ours: str, reference: str) -> None:
    outputs = {name: run() for name, run in runs.items()}
    milliseconds = timed(runs, count)
    print(f"\n{title}")
    for name, each in sorted(milliseconds.items(), key=lambda item: item[1]):
        error = nmse(outputs[name], outputs[reference])
        print(f"  {name:<34} {each:8.1f} ms   ours is {each / milliseconds[ours]:5.2f}x as fast   NMSE {error:.1e}")


def session(
    model: bytes | str, threads: int, config: dict[str, str] | None = None, profile: str | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(*engine.STOP_SPINNING)  # or threads would spin on while others are timed
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def show_operators(path: Path, threads: int, config: dict[str, str], feed: dict[str, np.ndarray]) -> None:
    """Where a model's time goes: milliseconds a run by operator, the six largest."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(str(path), threads, config, profile=f"{folder}/run")
        for _ in range(PROFILED_RUNS + 1):
            profiled.run(None, feed)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    spent: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent.setdefault(f"{event['args']['op_name']} {event['name']}", []).append(event["dur"] / 1000)
    by_operator: Counter[str] = Counter()
    for name, each in spent.items():
        by_operator[name.split()[0]] += float(np.median(each))
    print("  " + ", ".join(f"{operator} {each:.1f} ms" for operator, each in by_operator.most_common(6)))


def plain_model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    takes: int = TensorProto.FLOAT,
    gives: int = TensorProto.FLOAT,
) -> bytes:
    graph = helper.make_graph(
        nodes, "linear",
        [helper.make_tensor_value_info("x", takes, [1, "tokens", COLS])],
        [helper.make_tensor_value_info("y", gives, [1, "tokens", ROWS])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def block_4bit(weight: np.ndarray, block: int = 32) -> dict[str, np.ndarray]:
    """Uniform 4-bit blocks as MatMulNBits stores them: two codes a byte, zero point 8."""
    grouped = weight.reshape(ROWS, COLS // block, block)
    scale = np.abs(grouped).max(-1) / 7
    codes = np.clip(np.round(grouped / scale[..., None]) + 8, 0, 15).astype(np.uint8)
    return {"codes": codes[..., 0::2] | codes[..., 1::2] << 4, "scales": scale.astype(np.float32).reshape(-1)}


def our_linear(weight: torch.Tensor, bias: torch.Tensor, folder: Path, rotate: bool) -> Path:
    """One quantized layer through the project's own passes and engine."""
    size = {"rows": ROWS, "cols": COLS}
    codes = gs.Variable("linear.codes", np.int8, (ROWS, 1, COLS))
    exponents = gs.Variable("linear.exponents", np.int8, (ROWS, 1, 2, 3))
    scale, bias_in = gs.Variable("linear.scale", np.float32, (ROWS,)), gs.Variable("linear.bias", np.float32, (ROWS,))
    x = gs.Variable("x", np.float32, (1, "tokens", COLS))
    nodes, read = [], x
    if rotate:
        weight = Rotation(COLS, COLS).apply(weight)
        signs, read = gs.Constant("signs", np.ones(COLS, np.float32)), gs.Variable("rotated", np.float32, x.shape)
        nodes.append(gs.Node("HadamardRotate", "rotate", rotation_attributes(COLS), [x, signs], [read], domain="lrq"))
    decoding = {"bits": 4, "group_size": COLS} | size
    dense, turned = gs.Variable("dense", np.float32, (ROWS, COLS)), gs.Variable("turned", np.float32, (COLS, ROWS))
    product, y = (gs.Variable(name, np.float32, (1, "tokens", ROWS)) for name in ("product", "y"))
    nodes += [
        gs.Node("TwinLogDequant", "decode", decoding, [codes, exponents, scale], [dense], domain="lrq"),
        gs.Node("Transpose", "turn", {"perm": [1, 0]}, [dense], [turned]),
        gs.Node("MatMul", "multiply", {}, [read, turned], [product]),
        gs.Node("Add", "add", {}, [product, bias_in], [y]),
    ]
    graph = gs.Graph(nodes, [x, codes, exponents, scale, bias_in], [y], opset=21)
    expression = Expression("weight", (ROWS, COLS))
    traced = TracedGraph(
        graph,
        {"linear.codes": LinearWeight("linear", expression, 4, COLS, 8)},
        {"linear.bias": Expression("bias", (ROWS,))},
    )
    make_linear(traced)
    record = LayerRecord("linear", ROWS, COLS, 4, COLS, 8, 0, None, "nothing", "benchmark", [], "linear.bias")
    write_quantized(folder / "q.safetensors", [quantize_layer(weight, None, record)], {"linear.bias": bias})
    engine.build_engine(traced, QuantizedFile(folder / "q.safetensors"), folder)
    return folder


def bench_linear(threads: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(ROWS, COLS, generator=generator) * 0.02, torch.randn(ROWS, generator=generator)
    x = torch.randn(1, TOKENS, COLS, generator=generator)
    feed = {"x": x.numpy()}
    add = helper.make_node("Add", ["t", "bias"], ["y"])
    fp32 = plain_model(
        [helper.make_node("MatMul", ["x", "w"], ["t"]), add], {"w": weight.numpy().T.copy(), "bias": bias.numpy()}
    )
    nbits = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["t"], domain="com.microsoft", K=COLS, N=ROWS, bits=4, block_size=32,
        accuracy_level=4,
    )  # fmt: skip
    integers = np.clip(np.round(weight.numpy().T / 0.001), -127, 127).astype(np.int8)
    levels = np.random.default_rng(0).integers(0, 256, (1, TOKENS, COLS), np.uint8)
    product = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    bare = plain_model([product], {"w": integers}, TensorProto.UINT8, TensorProto.INT32)
    products = {
        "MatMulInteger alone": session(bare, threads),
        "with session.x64quantprecision": session(bare, threads, engine.EXACT_PRODUCTS),
    }
    sessions = {
        "ONNX Runtime fp32 MatMul": session(fp32, threads),
        "ONNX Runtime MatMulNBits 4-bit, level 4": session(
            plain_model([nbits, add], block_4bit(weight.numpy()) | {"bias": bias.numpy()}), threads
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, rotate in (("lrq-export engine", False), ("lrq-export engine, rotated input", True)):
            path = our_linear(weight, bias, Path(folder) / str(rotate), rotate)
            sessions[name] = engine.open_session(path, threads)
    runs: dict[str, Run] = {name: lambda s=s: s.run(None, feed)[0] for name, s in sessions.items()}
    runs["torch fp32"] = lambda: torch.nn.functional.linear(x, weight, bias).numpy()
    halves = [t.bfloat16() for t in (x, weight, bias)]
    runs["torch bf16"] = lambda: torch.nn.functional.linear(*halves).float().numpy()
    show(f"linear {TOKENS} x {COLS} -> {ROWS}", runs, count, "lrq-export engine", "torch fp32")
    alone = timed({name: lambda s=s: s.run(None, {"x": levels})[0] for name, s in products.items()}, count)
    print("  of ours: " + ", ".join(f"{name} {each:.1f} ms" for name, each in alone.items()))


def bench_block(threads: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pixart_xl.write_model(folder / "source", blocks=1)
        settings = {
            "calibration.samples": "2",
            "calibration.timesteps": "2",
            "sampling.images": "1",
            "sampling.steps": "1",
        }
        lrq_export.build(
            folder / "source", folder / "out", recipe=lrq_export.load_recipe(overrides=settings), until="engine"
        )
        engine_folder = folder / "out.partial" / "package" / "engine" / "onnxruntime"
        ours = engine.open_session(engine_folder, threads)
        source = open_source(folder / "source")
        traced = trace(source.family, source.config, [])
        weights = [onnx_float(each, source.checkpoint.read(traced.tensors[each].source)) for each in traced.tensors]
        write_model(folder / "fp32.onnx", traced.to_onnx(), weights)
        fp32 = session(str(folder / "fp32.onnx"), threads)
        model = source.load(source.model())
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(2, 4, 64, 64, generator=generator),
            "encoder_hidden_states": torch.randn(2, 120, 4096, generator=generator),
            "timestep": torch.tensor([500.0, 20.0]),
        }
        specs = source.family.inputs(source.config)
        feed = feeds(specs, inputs)
        low = source.family.construct(source.config)
        low.load_state_dict(model.state_dict(), assign=True)
        low = low.bfloat16()
        low_inputs = {each: tensor.bfloat16() for each, tensor in inputs.items()}
        with torch.no_grad():
            runs: dict[str, Run] = {
                "lrq-export engine": lambda: ours.run(None, feed)[0],
                "ONNX Runtime fp32": lambda: fp32.run(None, feed)[0],
                "torch fp32": lambda: source.family.call(model, inputs).numpy(),
                "torch bf16": lambda: source.family.call(low, low_inputs).float().numpy(),
            }
            show("PixArt-XL/2, one block, 1024 tokens, batch 2", runs, count, "lrq-export engine", "torch fp32")
            print("\nwhere the time of the engine goes, then that of ONNX Runtime fp32")
            show_operators(engine_folder / engine.MODEL, threads, engine.session_config(engine_folder), feed)
            show_operators(folder / "fp32.onnx", threads, {}, feed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", choices=["linear", "block"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    described = describe_machine()
    features = " ".join(described["features"]) or "unknown"
    print(f"{described['processor']}, {args.threads} threads, features: {features}")
    if args.only != "block":
        bench_linear(args.threads, args.runs)
    if args.only != "linear":
        bench_block(args.threads, max(3, args.runs // 3))


if __name__ == "__main__":
    main()
