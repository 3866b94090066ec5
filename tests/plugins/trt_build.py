"""Compiles the TensorRT plugins over kernels that run on the CPU, and the host that walks them, with g++ alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRT, HOST = ROOT / "plugins" / "trt", Path(__file__).parent / "host"
WARNINGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
INCLUDES = [f"-I{ROOT / 'plugins' / folder}" for folder in ("core", "kernels", "trt")]
# Left out of a library for the CPU: what allocates on a GPU, and the other library, which links TensorRT.
NOT_ON_CPU = ("device_memory.cpp", "register.cpp")
GPU_FLAG = "-DLRQ_HOST_ON_GPU"


@dataclass(frozen=True)
class Headers:
    """TensorRT's headers of one version."""

    folder: Path
    version: tuple[int, int, int]

    @property
    def name(self) -> str:
        return ".".join(map(str, self.version))


@cache
def all_headers() -> list[Headers]:
    """Those found on this machine, oldest first: TENSORRT_ROOT, the system's, the user's cache folder."""
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrq-export" / "tensorrt"
    folders = [*sorted(cached.glob("*/include")), Path("/usr/include"), Path("/usr/include/x86_64-linux-gnu")]
    if os.environ.get("TENSORRT_ROOT"):
        folders.insert(0, Path(os.environ["TENSORRT_ROOT"]) / "include")
    found = {version_of(folder): folder for folder in reversed(folders) if (folder / "NvInfer.h").is_file()}
    return [Headers(folder, version) for version, folder in sorted(found.items())]


def version_of(folder: Path) -> tuple[int, int, int]:
    """Its headers' own version; some spell it through another macro."""
    macros = dict(re.findall(r"#define (\w+) (\w+)", (folder / "NvInferVersion.h").read_text()))
    parts = [macros[f"NV_TENSORRT_{part}"] for part in ("MAJOR", "MINOR", "PATCH")]
    return tuple(int(macros.get(part, part)) for part in parts)


@cache
def cuda_headers() -> Path | None:
    """CUDA's runtime headers: TensorRT's include them."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    folders = [Path(root) / "include" for root in roots if root]
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()), None)


def missing() -> str | None:
    """What this machine lacks to compile plugins, in one line."""
    if shutil.which("g++") is None:
        return "needs a C++ compiler: install g++"
    if cuda_headers() is None:
        return "needs CUDA's headers: install the CUDA toolkit, or set CUDA_HOME"
    if not all_headers():
        return "needs TensorRT's headers: set TENSORRT_ROOT, or run lrq-export plugins build once, which downloads them"
    return None


def skip_if_missing() -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)


def compile_together(sources: list[Path], headers: Headers, *flags: str) -> None:
    """Compile as one unit, which takes TensorRT's headers once. Warnings are errors; raises CalledProcessError."""
    text = "".join(f'#include "{source}"\n' for source in sources)
    system = [f"-isystem{headers.folder}", f"-isystem{cuda_headers()}"]
    command = ["g++", *WARNINGS, *system, *INCLUDES, "-x", "c++", "-", "-x", "none", *flags]
    subprocess.run(command, input=text, text=True, check=True)


def plugin_sources() -> list[Path]:
    return sorted(path for path in TRT.glob("*.cpp") if path.name not in NOT_ON_CPU)


def build_library(folder: Path, headers: Headers, kernels: Path | None = None) -> Path:
    """liblrq_plugins.so in `folder`, over `kernels` or over reference loops on the CPU, which are put beside it."""
    shared = ["-O2", "-shared", "-fPIC", "-fvisibility=hidden"]
    library = folder / "liblrq_plugins.so"
    if kernels is None:
        kernels = folder / "liblrq_kernels.so"
        compile_together([HOST / "kernels_on_cpu.cpp"], headers, *shared, "-o", str(kernels))
    sources = [*plugin_sources(), HOST / "device_memory_on_cpu.cpp"]
    linked = [str(kernels), f"-Wl,-rpath,{kernels.parent}", "-Wl,--no-undefined"]
    compile_together(sources, headers, *shared, "-o", str(library), *linked)
    return library


def on_gpu() -> list[str]:
    """What `build_host` needs for a host that keeps its arrays in a GPU's memory."""
    return [GPU_FLAG, f"-L{cuda_headers().parent / 'lib64'}", "-lcudart"]


def build_host(folder: Path, headers: Headers, *flags: str) -> Path:
    """The conformance host."""
    program = folder / "conformance"
    sources = [HOST / name for name in ("cases.cpp", "conformance.cpp", "mutants.cpp", "main.cpp")]
    compile_together(sources, headers, "-O0", "-rdynamic", "-o", str(program), "-ldl", *flags)
    return program
