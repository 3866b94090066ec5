"""Checks of one package: whether it may be loaded, and which of its engines could run on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrq_export.admit import SESSION, admit
from lrq_export.doctor.finding import Finding, absent, ok, wrong
from lrq_export.doctor.system import System
from lrq_export.engine.built import BUILD, FOLDERS, PLAN, read_built
from lrq_export.engine.plan_header import STARTS
from lrq_export.engine.run_obstacle import run_obstacle
from lrq_export.errors import InputError
from lrq_export.package import ONNXRUNTIME_ENGINE


def admission(package: Path) -> tuple[Finding, dict[str, Any] | None]:
    """The package as a whole, and its manifest; None if it is refused."""
    try:
        manifest = admit(package)
    except InputError as error:
        return wrong("package", error.message, error.hint or "build it again", required=True), None
    found = f"{len(manifest['files'])} files as they were built, {len(manifest['layers'])} quantized layers"
    return ok("package", found, required=True), manifest


def engine_findings(system: System, package: Path, files: dict[str, Any]) -> Iterator[Finding]:
    """One finding for each engine that there can be."""
    yield onnxruntime_engine(files)
    for target in STARTS:
        yield other_engine(system, package, files, target)


def onnxruntime_engine(files: dict[str, Any]) -> Finding:
    if {f"{ONNXRUNTIME_ENGINE}/{name}" for name in ("model.onnx", SESSION)} <= files.keys():
        return ok("engine onnxruntime", "can run here", required=True)
    return wrong("engine onnxruntime", "the package does not hold it whole", "build the package again", required=True)


def other_engine(system: System, package: Path, files: dict[str, Any], target: str) -> Finding:
    """An engine of NVIDIA's is for one library in one version, and for GPUs."""
    name, folder = f"engine {target}", FOLDERS[target]
    if f"{folder}/{BUILD}" not in files or f"{folder}/{PLAN}" not in files:
        again = f"lrq-export build {package} --target {target}"
        return absent(name, f"serving by {STARTS[target][1]}", again)
    lack = run_obstacle(package, target, system)
    if lack is not None:
        return wrong(name, lack.message, lack.hint)
    return ok(name, f"of {read_built(package / folder).version} can run here")
