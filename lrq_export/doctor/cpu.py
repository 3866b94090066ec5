"""Checks of what every build and every package needs: Python, its libraries, disk, memory."""

from pathlib import Path

from lrq_export.doctor.finding import Finding, absent, ok, wrong
from lrq_export.doctor.system import System, version_of

OLDEST_PYTHON = (3, 11)
OWN_LINE = {"torch": "torch", "onnx": "onnx", "onnxruntime": "onnxruntime"}  # module: distribution
# For small models; a PixArt-XL/2 builds in 5.6 GiB (docs/performance.md).
LEAST_MEMORY, LEAST_DISK = 2 << 30, 1 << 30
GIB = 1 << 30
ONNXRUNTIMES = ("onnxruntime-gpu", "onnxruntime")  # distributions of one module


def python(system: System) -> Finding:
    version = ".".join(map(str, system.python))
    if system.python < OLDEST_PYTHON:
        return wrong("Python", f"got {version}, needed 3.11 or newer", "install a newer Python", required=True)
    if not system.kind.startswith("Linux"):
        return wrong("Python", f"got {system.kind}, needed Linux", "use Linux, or WSL on Windows", required=True)
    return ok("Python", f"{version} on {system.kind}", required=True)


def torch(system: System) -> Finding:
    return _library(system, "torch")


def onnx(system: System) -> Finding:
    return _library(system, "onnx")


def other_libraries(system: System) -> Finding:
    """Everything else that `pip install lrq-export` brings."""
    least = {name: needed for name, needed in system.requirements().items() if name not in OWN_LINE.values()}
    for name, needed in least.items():
        got = system.version(name)
        if got is None or version_of(got) < version_of(needed):
            return wrong(
                "other libraries", f"{name}: got {got or 'none'}, needed {needed} or newer",
                f"pip install '{name}>={needed}'", required=True,
            )  # fmt: skip
    return ok("other libraries", f"{len(least)} in the versions needed", required=True)


def onnxruntime(system: System) -> Finding:
    found = [name for name in ONNXRUNTIMES if system.version(name) is not None]
    if len(found) == len(ONNXRUNTIMES):
        return wrong(
            "ONNX Runtime", "onnxruntime and onnxruntime-gpu are both installed, and overwrite one another's files",
            "pip uninstall onnxruntime onnxruntime-gpu, then install the one that you want", required=True,
        )  # fmt: skip
    library = _library(system, "onnxruntime", found[0] if found else "onnxruntime", "ONNX Runtime")
    if library.fix is not None:
        return library
    providers = system.providers()
    if "CPUExecutionProvider" not in providers:
        return wrong("ONNX Runtime", f"got no CPU provider, only {', '.join(providers)}", "install it again", True)
    shown = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
    return ok("ONNX Runtime", f"{system.version(found[0])}, providers {shown}", required=True)


def disk(system: System) -> Finding:
    free = system.free_disk(Path.cwd())
    if free < LEAST_DISK:
        return wrong(
            "disk", f"got {free / GIB:.1f} GiB free here, needed {LEAST_DISK / GIB:.0f}",
            "free some, or build elsewhere", required=True,
        )  # fmt: skip
    return ok("disk", f"{free / GIB:.1f} GiB free here", required=True)


def memory(system: System) -> Finding:
    found = system.memory()
    if found is None:
        return absent("memory", "nothing; this system does not say how much it has", "look yourself")
    total, available = found
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < LEAST_MEMORY:
        return wrong(
            "memory", f"{text}, needed {LEAST_MEMORY / GIB:.0f} for a small model", "end other programs, or add memory",
            required=True,
        )  # fmt: skip
    return ok("memory", text, required=True)


def _library(system: System, module: str, distribution: str | None = None, name: str | None = None) -> Finding:
    """A library is there, new enough, and can be imported."""
    distribution, name = distribution or module, name or module
    got, needed = system.version(distribution), system.requirements().get(OWN_LINE[module])
    fix = f"pip install '{distribution}>={needed}'" if needed else f"pip install {distribution}"
    if got is None:
        return wrong(name, "is not installed", fix, required=True)
    if needed and version_of(got) < version_of(needed):
        return wrong(name, f"got {got}, needed {needed} or newer", fix, required=True)
    error = system.import_error(module)
    if error is not None:
        return wrong(
            name, f"{got} cannot be imported: {error}", f"pip install --force-reinstall {distribution}", required=True
        )
    return ok(name, got, required=True)


CHECKS = (python, torch, onnx, onnxruntime, other_libraries, disk, memory)
