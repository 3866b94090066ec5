"""Engines of TensorRT and TensorRT-RTX: the rewritten graph, written for their parser, built by a process of its own.

    model.onnx      what the parser reads: with plugins, lrq nodes whose codes lie in words; without, standard ops alone
    model_trt_plugins.onnx  TensorRT with plugins: the same, as ONNX Runtime's TensorRT provider parses it
    model.plan      the engine
    timing.cache    what TensorRT measured, for the next build of the same kind of GPU
    layers.json     the layers of the engine, as its inspector lists them
    model_ctx.onnx  TensorRT: the engine as ONNX Runtime's TensorRT provider opens it
    build.json      sizes, options and versions; written last

TensorRT-RTX builds for named compute capabilities on any machine. TensorRT builds for the GPU at hand, and needs it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from graphs import names
from graphs.checks import check
from graphs.integer_data import check_same_integers, integer_layers
from graphs.passes import ACTIVATIONS, target_onnxruntime_trt, target_passes
from graphs.traced import TracedGraph
from lrq_export.bind import write_for_plugins, write_standard
from lrq_export.doctor.gpu import provider_needs
from lrq_export.doctor.system import System, version_of
from lrq_export.engine.built import BUILD, PLAN, RTX, TENSORRT
from lrq_export.engine.ep_context import CONTEXT, write_context
from lrq_export.engine.plan_layers import NodeTypes, float_type
from lrq_export.engine.profiles import Range, shapes_of
from lrq_export.engine.run_obstacle import gpu_obstacle, library_obstacle
from lrq_export.errors import CheckFailed, MissingError
from lrq_export.models.base import InputSpec
from lrq_export.onnx_file import data_file, read_model
from lrq_export.package import write_json_atomic
from lrq_export.plugins import LIBRARY, find_library
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Engine

FLOAT32 = "float32"
MODEL, TIMING_CACHE, LAYERS = "model.onnx", "timing.cache", "layers.json"
PROVIDER_MODEL = "model_trt_plugins.onnx"
_RTX_LIBRARY = "libtensorrt_rtx.so"
_LOGGED = "[E] "


@dataclass(frozen=True)
class Request:
    """What to build, for which sizes, and how."""

    target: str  # tensorrt or tensorrt-rtx
    profiles: Sequence[Mapping[str, Range]]
    specs: Mapping[str, InputSpec]
    settings: Engine

    def library(self) -> Path | None:
        """The plugins that run the lrq nodes; None if their bodies do.

        Raises MissingError if the recipe wants plugins that are not compiled.
        """
        if self.settings.plugins == "never":
            return None
        found = find_library()
        if found is None and self.settings.plugins == "always":
            raise MissingError(
                f"engine.plugins is always, and {LIBRARY} is not compiled", hint="run lrq-export plugins build"
            )
        return found

    def cannot_refit(self) -> MissingError | None:
        """Why this machine cannot build an engine that takes its weights later; None if it can, or is not asked to."""
        asked = [name for name in ("refit", "strip") if getattr(self.settings, name)]
        if not asked or gpu_at_hand() is not None:  # TensorRT-RTX calls CUDA while it builds what can be refitted
            return None
        return MissingError(
            f"{self.target}: without a CUDA GPU it builds no engine that can be refitted (engine.{asked[-1]})",
            hint=f"build the engine where it will run, or with --set engine.{asked[-1]}=false: a recipe keeps what was "
            "asked for, by an earlier command too",
        )


def obstacle(target: str) -> MissingError | None:
    """Why this machine cannot build a target's engine; None if nothing is known to be in the way."""
    system = System()
    if (missing := library_obstacle(target, system)) is not None:
        return missing
    if find_spec("polygraphy") is None:
        return MissingError(f"{target}: polygraphy is not installed", hint="pip install polygraphy")
    return gpu_obstacle(target, system, "build the engine where it will run") if target == TENSORRT else None


def write_network(
    traced: TracedGraph, quantized: QuantizedFile, folder: Path, plugins: bool, activations: str = FLOAT32, **options
) -> dict[str, NodeTypes]:
    """Write model.onnx as TensorRT's parser takes it; returns its lrq nodes by name, none without plugins."""
    lowered = lower(traced, plugins, activations)
    if not plugins:
        write_standard(lowered, quantized, folder / MODEL, **options)
        return {}
    write_for_plugins(lowered, quantized, folder / MODEL, **options)
    return {node.name: _types_of(node) for node in lowered.graph.nodes if node.domain == names.DOMAIN}


def _types_of(node: gs.Node) -> NodeTypes:
    return NodeTypes(*(float_type(str(tensor.dtype)) for tensor in (node.inputs[0], node.outputs[0])))


def write_for_provider(
    traced: TracedGraph, quantized: QuantizedFile, folder: Path, activations: str = FLOAT32, **options
) -> None:
    """Write model.onnx again for ONNX Runtime's TensorRT provider, which finds plugins by a domain of its own.

    Weights that lie beside model.onnx serve both.
    """
    lowered = lower(traced, True, activations)
    target_onnxruntime_trt(lowered)
    write_for_plugins(lowered, quantized, folder / PROVIDER_MODEL, data=data_file(folder / MODEL), **options)


def lower(traced: TracedGraph, plugins: bool, activations: str = FLOAT32) -> TracedGraph:
    """A copy of the graph that computes in the type `activations`; every layer is still the same integers.

    For plugins its nodes read their codes as those do.
    """
    lowered, integers = traced.copy(), integer_layers(traced)
    for step in target_passes(TENSORRT, activations) if plugins else ACTIVATIONS[activations]:
        step(lowered)
        check(lowered)
        check_same_integers(integers, integer_layers(lowered))
    return lowered


def build_plan(traced: TracedGraph, quantized: QuantizedFile, folder: Path, request: Request) -> dict[str, Any]:
    """Write the whole of an engine's folder; returns what build.json holds.

    Raises MissingError for what this machine lacks, after model.onnx is written, so that another one can go on;
    CheckFailed for an engine that TensorRT refuses, or that runs an lrq node by anything but its plugin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = request.library()
    activations = request.settings.activations
    nodes = write_network(traced, quantized, folder, library is not None, activations)
    if request.target == TENSORRT and nodes:
        write_for_provider(traced, quantized, folder, activations)
    missing = obstacle(request.target) or request.cannot_refit()
    if missing is not None:
        raise missing
    cache = str(folder / TIMING_CACHE) if request.target == TENSORRT else None  # RTX asks the GPU to make one
    job = {
        "do": "build", "target": request.target, "model": str(folder / MODEL), "engine": str(folder / PLAN),
        "layers": str(folder / LAYERS), "timing_cache": cache,
        "plugins": None if library is None else str(library), "plugin_nodes": nodes,
        "profiles": [shapes_of(ranges, request.specs) for ranges in request.profiles],
        "options": request.settings.model_dump(mode="json"),
    }  # fmt: skip
    answer = run_worker(job)
    if "error" in answer:
        raise CheckFailed(
            f"{request.target}: {answer['error']}",
            hint="engine.plugins=never builds from standard ops" if nodes else "report this fault of lrq-export",
        )
    if request.target == TENSORRT:
        outputs = read_model(folder / MODEL).graph.output
        write_context(folder, PLAN, request.specs, outputs, answer["version"])
    facts = answer | {
        "target": request.target, "plugins": library is not None, "nodes": len(nodes),
        "profiles": [{axis: list(sizes) for axis, sizes in ranges.items()} for ranges in request.profiles],
        "options": job["options"], "gpu": gpu_at_hand() if request.target == TENSORRT else None,
        "warnings": _unpaired(answer["version"]) if request.target == TENSORRT else [],
    }  # fmt: skip
    write_json_atomic(folder / BUILD, facts)
    return facts


def _unpaired(version: str) -> list[str]:
    """What is to be said if the ONNX Runtime here cannot open model_ctx.onnx around an engine of this version."""
    needed = provider_needs(System())
    if needed is None or version_of(version)[:1] == (needed,):
        return []
    return [
        f"ONNX Runtime's TensorRT provider here needs libnvinfer.so.{needed} and does not open an engine of TensorRT "
        f"{version} ({CONTEXT}); load and serve open it without ONNX Runtime"
    ]


def run_worker(job: dict[str, Any]) -> dict[str, Any]:
    """The answer of the process that builds or runs an engine; raises CheckFailed if it ended without one."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps(job))
        environment = dict(os.environ)
        if job["target"] == RTX and job["plugins"] is not None:
            environment["LD_LIBRARY_PATH"] = (
                f"{unversioned_library(Path(scratch))}:{environment.get('LD_LIBRARY_PATH', '')}"
            )
        command = [sys.executable, "-m", f"{__package__}.tensorrt_worker", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
        if "error" in answer:
            answer["error"] = "; ".join([answer["error"], *_errors_logged(lines)[:1]])
        return answer
    except (IndexError, ValueError):
        said = " | ".join(line.strip() for line in (done.stderr or done.stdout).splitlines()[-3:])
        raise CheckFailed(
            f"{job['target']}: the process of its library ended with {done.returncode}: {said}",
            hint="check memory and disk, then run the same command again",
        ) from None


def _errors_logged(lines: Sequence[str]) -> list[str]:
    """What TensorRT's logger said of errors, through polygraphy, whose own exceptions do not say why."""
    return [line.removeprefix(_LOGGED).strip() for line in lines if line.startswith(_LOGGED)]


def unversioned_library(folder: Path) -> Path:
    """A folder in which RTX's parser finds the library that it asks for by a name without version.

    The wheel has libtensorrt_rtx.so.1 alone, and the parser ends the process if a plugin makes it look for the other.
    """
    spec = find_spec("tensorrt_rtx_libs")
    for place in [] if spec is None else spec.submodule_search_locations or ():
        for library in sorted(Path(place).glob(f"{_RTX_LIBRARY}.*")):
            link = folder / _RTX_LIBRARY
            link.unlink(missing_ok=True)  # of an earlier replay, maybe in another environment
            link.symlink_to(library)
    return folder


def gpu_at_hand() -> str | None:
    """The name of the GPU that engines are built for and run on; None without one."""
    return System().gpu()
