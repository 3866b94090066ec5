"""A process of its own in which NVIDIA's library builds or runs an engine.

    python -m lrq_export.engine.tensorrt_worker JOB

JOB is a JSON file, as `lrq_export.engine.tensorrt` writes it. Polygraphy can drive TensorRT or TensorRT-RTX, one of
them in a process; and a library that ends its process instead of failing ends only this one. The answer is the last
line on standard output, as JSON: what was built, or {"error": ...}.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lrq_export.engine.built import RTX
from lrq_export.engine.plan_layers import NodeTypes, float_type, judged_types, layer_faults, type_faults

RTX_VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX"  # 1: polygraphy drives TensorRT-RTX in this process


class CannotBuild(Exception):
    """What was wrong, in a line."""


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Build the engine of a job into its file; what the parser made of the graph, and versions."""
    trt = _library(job["target"])
    _load_plugins(trt, job["plugins"])
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path

    builder, network, parser = network_from_onnx_path(job["model"], strongly_typed=True)
    nodes = {name: NodeTypes(*types) for name, types in job["plugin_nodes"].items()}
    _check_plugins(trt, network, nodes)
    config = _config(trt, builder, network, job)
    plan = engine_bytes_from_network((builder, network, parser), config, save_timing_cache=job["timing_cache"])
    file = Path(job["engine"])
    file.write_bytes(memoryview(plan))
    return {
        "version": trt.__version__,
        "engine_bytes": file.stat().st_size,
        "layers": network.num_layers,
        "plugin_layers": len(_plugin_layers(trt, network)),
        "inspected": None if job["target"] == RTX else _inspect(trt, file, nodes, Path(job["layers"])),
    }


def infer(job: dict[str, Any]) -> dict[str, Any]:
    """Run an engine on the cases of a job; the names of its outputs, whose values lie in the files that it names."""
    trt = _library(job["target"])
    _load_plugins(trt, job["plugins"])
    from polygraphy.backend.trt import TrtRunner

    plan = marked_plan(job) if job["engine"] is None else Path(job["engine"]).read_bytes()
    names: list[str] = []
    runtime, engine = _deserialized(trt, plan)
    with TrtRunner(engine) as runner:
        for case in job["cases"]:
            runner.set_profile(case["profile"])
            with np.load(case["feed"], allow_pickle=False) as arrays:
                feed = {name: arrays[f"arr_{index}"] for index, name in enumerate(case["shapes"])}
            answers = runner.infer(feed)
            names = list(answers)
            np.savez(case["answers"], *answers.values())
    del engine, runtime  # in this order
    return {"outputs": names}


def _deserialized(trt, plan) -> tuple[Any, Any]:
    """The runtime, which must outlive it, and the engine of a plan.

    Not by polygraphy, which lets the runtime run code that a plan brings along: a package may come from anyone.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise CannotBuild(f"{trt.__name__} {trt.__version__} does not take the engine")
    return runtime, engine


def mark(job: dict[str, Any]) -> dict[str, Any]:
    """What `infer` does of a model without running it, which needs no GPU."""
    _load_plugins(_library(job["target"]), job["plugins"])
    return {"engine_bytes": memoryview(marked_plan(job)).nbytes}


def marked_plan(job: dict[str, Any]):
    """An engine of the job's model whose outputs are the job's, with a profile for the sizes of each case."""
    from polygraphy.backend.trt import (
        CreateConfig,
        Profile,
        engine_bytes_from_network,
        modify_network_outputs,
        network_from_onnx_path,
    )

    network = modify_network_outputs(network_from_onnx_path(job["model"], strongly_typed=True), outputs=job["outputs"])
    profiles = []
    for case in job["cases"]:
        profiles.append(Profile())
        for name, shape in case["shapes"].items():
            profiles[-1].add(name, min=shape, opt=shape, max=shape)
    return engine_bytes_from_network(network, CreateConfig(profiles=profiles))


def _library(target: str):
    """The Python module of the target; polygraphy looks for the same one."""
    os.environ[RTX_VARIABLE] = str(int(target == RTX))
    name = "tensorrt_rtx" if target == RTX else "tensorrt"
    try:
        return __import__(name)
    except ImportError as error:
        raise CannotBuild(f"{name} cannot be imported: {error}") from error


def _load_plugins(trt, library: str | None) -> None:
    if library is None:
        return
    if trt.get_plugin_registry().load_library(library) is None:
        raise CannotBuild(f"{library}: TensorRT {trt.__version__} does not load it")


def _plugin_layers(trt, network) -> list[Any]:
    layers = map(network.get_layer, range(network.num_layers))
    return [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]


def _check_plugins(trt, network, wanted: dict[str, NodeTypes]) -> None:
    """Every lrq node must have become one plugin layer in its types, and nothing else a plugin."""
    layers = _plugin_layers(trt, network)
    found = [layer.name for layer in layers]
    missing, others = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or others or len(found) != len(wanted):
        what = (
            f"no plugin runs {missing[0]}" if missing else f"a plugin runs {others[0]}" if others else "some run twice"
        )
        raise CannotBuild(f"{len(found)} plugin layers, needed the {len(wanted)} lrq nodes of the graph: {what}")
    for layer in layers:
        got = (float_type(layer.get_input(0).dtype.name), float_type(layer.get_output(0).dtype.name))
        _refuse(type_faults(layer.name, got, wanted[layer.name]))


def _refuse(faults: list[str]) -> None:
    if faults:
        raise CannotBuild(faults[0] if len(faults) == 1 else f"{faults[0]}; and {len(faults) - 1} more like it")


def _config(trt, builder, network, job: dict[str, Any]):
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles = []
    for shapes in job["profiles"]:
        profile = Profile()
        for name, (least, usual, most) in shapes.items():
            profile.add(name, min=least, opt=usual, max=most)
        profiles.append(profile)
    options = job["options"]
    shared = {"profiles": profiles, "builder_optimization_level": options["optimization"], "profiling_verbosity":
              trt.ProfilingVerbosity.DETAILED, "weight_streaming": options["weight_streaming"],
              "strip_plan": options["strip"]}  # fmt: skip
    if job["target"] == RTX:
        config = CreateConfig(**shared)(builder, network)
        _make_refittable(trt, config, options)
        capabilities = options["compute_capabilities"]
        if capabilities:
            config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
        return config
    hardware = {
        "this": trt.HardwareCompatibilityLevel.NONE,
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    }
    config = CreateConfig(
        **shared, hardware_compatibility_level=hardware[options["hardware"]], load_timing_cache=job["timing_cache"]
    )(builder, network)
    _make_refittable(trt, config, options)
    return config


def _make_refittable(trt, config, options: dict[str, Any]) -> None:
    if options["refit"] or options["strip"]:  # what is stripped is what a refit brings
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


def _inspect(trt, file: Path, nodes: dict[str, NodeTypes], listed: Path) -> dict[str, int]:
    """Write down what the built engine says of its layers: one plugin layer for each lrq node, or CannotBuild."""
    runtime, engine = _deserialized(trt, file.read_bytes())
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    del inspector, engine, runtime  # in this order
    layers = json.loads(text)["Layers"]
    _refuse(layer_faults(layers, nodes))
    listed.write_text(text)
    return {"layers": len(layers), "plugin_layers_of_told_type": judged_types(layers, nodes)}


def main() -> None:
    try:
        job = json.loads(Path(sys.argv[1]).read_text())
        answer = {"build": run, "mark": mark, "infer": infer}[job["do"]](job)
    except CannotBuild as error:
        answer = {"error": str(error)}
    except Exception as error:  # polygraphy's own, which say what TensorRT refused
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    # Last, and on the real standard output: libraries print there too.
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
