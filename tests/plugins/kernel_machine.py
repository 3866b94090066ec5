"""Where the kernels of plugins/kernels run in tests: compiled for the CPU with the emulator, or on a GPU.

A machine places arrays in its memory between sentinels and reads them back; what is written beside an output is seen.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lrq_export import kernels
from lrq_export.errors import MissingError
from lrq_export.kernels import Type

KERNELS = Path(__file__).parents[2] / "plugins" / "kernels"
EMULATOR = Path(__file__).parent / "emulator"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
DEFINES = ["-DLRQ_EMULATED", "-DLRQ_ARCHITECTURES=80", "-DLRQ_MOST_DECODED_BYTES=4096"]
FLAGS = ["-std=c++17", "-O1", *WARNINGS, "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", *DEFINES]
HOST = ("checks", "linear", "c_api", "instantiations")
DEVICE = ("decode_weight", "few_tokens", "any_size")
ELEMENTS = {"Float": "float", "Half": "Half", "Bfloat16": "Bfloat16"}

FENCE, ALIGNMENT = 256, 256  # bytes of sentinels on each side of an array, and where it begins
SENTINEL = 0xA5
TYPES = {Type.FLOAT: np.float32, Type.HALF: np.float16, Type.BFLOAT16: ml_dtypes.bfloat16}


def build_emulated(folder: Path) -> Path:
    """The kernels as a library for the CPU; built once, whoever asks first."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler: install g++")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "liblrq_kernels_emulated.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(folder, library)
    return library


def _compile(folder: Path, library: Path) -> None:
    (folder / "instantiations.inc").write_text("")
    include = [f"-I{path}" for path in (EMULATOR, folder, KERNELS)]
    units = [(name, KERNELS / f"{name}.cpp", ()) for name in HOST] + [("emulator", EMULATOR / "emulator.cpp", ())]
    units += [(name, KERNELS / f"{name}.cu", ()) for name in DEVICE]
    for name, element in ELEMENTS.items():
        defines = (f"-DLRQ_ELEMENT={element}", f"-DLRQ_ROTATE=rotate{name}")
        units.append((f"rotate{name}", KERNELS / "rotate_quantize.cu", defines))

    def build(unit: tuple[str, Path, tuple[str, ...]]) -> str:
        name, source, defines = unit
        target = str(folder / f"{name}.o")
        _run(["g++", *FLAGS, *include, *defines, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, units))
    _run(["g++", "-shared", *objects, "-o", str(library)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass
class Buffer:
    """An array between sentinels in a machine's memory; `address` is None for no array at all."""

    address: int | None
    shape: tuple[int, ...] = ()
    dtype: Any = np.uint8
    owner: Any = None
    start: int = 0

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


NOTHING = Buffer(None)


class Machine:
    """Memory and the library that computes on it."""

    name = ""

    def __init__(self, library: Path):
        self.kernels = kernels.Kernels(library)

    def put(self, array: np.ndarray) -> Buffer:
        """The array on the machine, element for element."""
        array = np.ascontiguousarray(array)
        return self._place(array.reshape(-1).view(np.uint8), array.shape, array.dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """Room for an output, full of sentinels."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._place(np.full(count, SENTINEL, np.uint8), shape, np.dtype(dtype))

    def read(self, buffer: Buffer) -> np.ndarray:
        """What the buffer holds, once it is sure that nothing was written beside it."""
        raw = self._fetch(buffer)
        before, after = raw[: buffer.start], raw[buffer.start + buffer.bytes :]
        assert (before == SENTINEL).all(), "written in front of the array"
        assert (after == SENTINEL).all(), "written behind the array"
        inside = raw[buffer.start : buffer.start + buffer.bytes].copy()
        return inside.view(buffer.dtype).reshape(buffer.shape)

    def _place(self, raw: np.ndarray, shape: tuple[int, ...], dtype: Any) -> Buffer:
        raise NotImplementedError

    def _fetch(self, buffer: Buffer) -> np.ndarray:
        raise NotImplementedError


class Emulated(Machine):
    """The CPU, by tests/plugins/emulator."""

    name = "emulated"

    def __init__(self, library: Path):
        super().__init__(library)
        self._library = ctypes.CDLL(str(library))
        self._library.emulatedKernel.restype = ctypes.c_char_p

    def launched(self) -> tuple[tuple[str, ...], int]:
        """Types of the parameters of the kernel that ran last, and how many threads a block of it had."""
        parameters = re.search(r"Parameters = \{(.*?)\}", self._library.emulatedKernel().decode())[1]
        return tuple(parameters.replace("lrq::", "").split(", ")), self._library.emulatedThreads()

    def _place(self, raw: np.ndarray, shape: tuple[int, ...], dtype: Any) -> Buffer:
        owner = np.full(raw.size + 2 * FENCE + ALIGNMENT, SENTINEL, np.uint8)
        start = FENCE + -(owner.ctypes.data + FENCE) % ALIGNMENT
        owner[start : start + raw.size] = raw
        return Buffer(owner.ctypes.data + start, shape, dtype, owner, start)

    def _fetch(self, buffer: Buffer) -> np.ndarray:
        return buffer.owner


class Cuda(Machine):
    """A GPU, through torch."""

    name = "cuda"

    def _place(self, raw: np.ndarray, shape: tuple[int, ...], dtype: Any) -> Buffer:
        import torch

        host = np.full(raw.size + 2 * FENCE, SENTINEL, np.uint8)
        host[FENCE : FENCE + raw.size] = raw
        owner = torch.from_numpy(host).cuda()
        return Buffer(owner.data_ptr() + FENCE, shape, dtype, owner, FENCE)

    def _fetch(self, buffer: Buffer) -> np.ndarray:
        return buffer.owner.cpu().numpy()


def cuda_machine() -> Cuda:
    """A GPU with the compiled library, or a skip that says what is missing."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU and a torch that sees it")
    try:
        return Cuda(kernels.find_library())
    except MissingError as error:
        pytest.skip(f"needs the compiled kernels: {error}")


def nmse(got: np.ndarray, needed: np.ndarray) -> float:
    got, needed = got.astype(np.float64), needed.astype(np.float64)
    assert got.shape == needed.shape
    return float(((got - needed) ** 2).sum() / max((needed**2).sum(), 1e-300))
