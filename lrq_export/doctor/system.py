"""What the checks ask of this machine. One class, so that a test can answer in its place."""

import ctypes
import ctypes.util
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lrq_export.plugins import find_library

_CUDA_NAME_BYTES = 256
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_SECONDS = 60  # for a tool that is asked for its version


@dataclass(frozen=True)
class Driver:
    """The CUDA driver: the newest CUDA it runs, and (name, compute capability) of every GPU."""

    cuda: tuple[int, int]
    gpus: tuple[tuple[str, tuple[int, int]], ...]


class System:
    """This machine, as it is."""

    @property
    def environment(self) -> Mapping[str, str]:
        return os.environ

    @property
    def python(self) -> tuple[int, ...]:
        return sys.version_info[:3]

    @property
    def kind(self) -> str:
        """E.g. "Linux x86_64"."""
        return f"{platform.system()} {platform.machine()}"

    def version(self, distribution: str) -> str | None:
        """Of an installed Python distribution."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def requirements(self) -> dict[str, str]:
        """Least versions of what lrq-export cannot do without, by distribution."""
        try:
            lines = importlib.metadata.requires("lrq-export") or []
        except importlib.metadata.PackageNotFoundError:
            return {}
        found = (re.fullmatch(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in lines)
        return {match[1]: match[2] for match in found if match}

    def import_error(self, module: str) -> str | None:
        """Why a module cannot be imported; None if it can."""
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken library raises OSError, ImportError, or what it likes
            return f"{type(error).__name__}: {error}"
        return None

    def folders(self, module: str) -> list[Path]:
        """Where a module that is a package lies; not imported."""
        spec = importlib.util.find_spec(module)
        return [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]

    def providers(self) -> list[str]:
        """ONNX Runtime's execution providers."""
        import onnxruntime

        return onnxruntime.get_available_providers()

    def which(self, program: str) -> str | None:
        return shutil.which(program)

    def output(self, *command: str) -> str | None:
        """What a program prints; None if it fails."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    def system_library(self, name: str) -> str | None:
        """File name of a library that the dynamic linker finds."""
        return ctypes.util.find_library(name)

    def driver(self) -> Driver | str | None:
        """The CUDA driver, None if there is none, or why it does not work."""
        try:
            cuda = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None
        status = cuda.cuInit(0)
        if status != 0:
            return f"cuInit returns {status}"
        version, count = ctypes.c_int(), ctypes.c_int()
        cuda.cuDriverGetVersion(ctypes.byref(version))
        cuda.cuDeviceGetCount(ctypes.byref(count))
        gpus = []
        for index in range(count.value):
            device, name = ctypes.c_int(), ctypes.create_string_buffer(_CUDA_NAME_BYTES)
            major, minor = ctypes.c_int(), ctypes.c_int()
            cuda.cuDeviceGet(ctypes.byref(device), index)
            cuda.cuDeviceGetName(name, _CUDA_NAME_BYTES, device)
            cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
            cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
            gpus.append((name.value.decode("utf-8", "replace"), (major.value, minor.value)))
        return Driver((version.value // 1000, version.value % 1000 // 10), tuple(gpus))

    def gpu(self) -> str | None:
        """The name of the GPU that torch computes on; None where it sees none, or is not here itself."""
        try:
            import torch
        except Exception:  # a broken library raises OSError, ImportError, or what it likes
            return None
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None

    def plugin_library(self) -> Path | None:
        """Raises MissingError if LRQ_PLUGINS names nothing that is there."""
        return find_library()

    def header_folders(self) -> list[Path]:
        """Where the build of the plugins looks for TensorRT's headers, after TENSORRT_ROOT."""
        system = [Path("/usr/local/include"), Path("/usr/include"), Path("/usr/include") / _multiarch()]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrq-export" / "tensorrt"
        return system + sorted(cache.glob("*/include"), key=lambda path: version_of(path.parent.name), reverse=True)

    def free_disk(self, path: Path) -> int:
        return shutil.disk_usage(path).free

    def memory(self) -> tuple[int, int] | None:
        """(all, available) bytes, of the container where that has a limit; None where the system does not say."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if len(line.split()) > 1}
        total, available = 1024 * kib["MemTotal"], 1024 * kib.get("MemAvailable", kib["MemFree"])
        limit = _number(Path("/sys/fs/cgroup/memory.max"))
        if limit is not None and limit < total:
            used = _number(Path("/sys/fs/cgroup/memory.current")) or 0
            total, available = limit, min(available, limit - used)
        return total, available


def version_of(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "v10.16.1rc2" is (10, 16, 1)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, match[1].split("."))) if match else ()


def _multiarch() -> str:
    return f"{platform.machine()}-linux-gnu"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" where there is no limit
        return None
