"""liblrq_kernels through ctypes: the dialect's ops on device memory, as `plugins/kernels/kernels.h` declares them.

The structs here are those of the header, field by field; loading checks that their sizes agree. A call takes addresses
of device memory and a stream, checks everything on the host and raises KernelError with what it got and needed.
`lrq_export.torch_ops` puts torch tensors in front of it.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from lrq_export import plugins
from lrq_export.errors import LrqError, MissingError

ENVIRONMENT = "LRQ_KERNELS"


class KernelError(LrqError):
    """A call that the library refused; `status` is its return value."""

    def __init__(self, function: str, status: int, text: str):
        super().__init__(f"{function}: {text} (status {status})")
        self.status = status


class Status(IntEnum):
    """What a call returns: `Status` of core/formats.h and `LrqKernelsStatus`."""

    OK = 0
    NULL_POINTER = 1
    BAD_BITS = 2
    BAD_SIZE = 3
    BAD_GROUP = 4
    BAD_FORMAT = 6
    BAD_BLOCK = 7
    BAD_VALUE = 8
    MISALIGNED = 101
    BAD_WORKSPACE = 102
    NOT_COMPILED = 103
    CUDA_ERROR = 104


class Type(IntEnum):
    """The element type T of activations."""

    FLOAT = 0
    HALF = 1
    BFLOAT16 = 2


class Prologue(IntEnum):
    """What is computed from x before it is rotated."""

    NONE = 0
    LAYER_NORM = 1
    RMS_NORM = 2
    GELU = 3
    GELU_TANH = 4
    SILU = 5
    GEGLU = 6


class Format(IntEnum):
    """What the integers of a weight are made of."""

    TWIN_LOG = 0
    CODEBOOK = 1
    INT8 = 2


class Layout(IntEnum):
    """Where codes lie: `graphs.ops.packing` or `graphs.ops.words`."""

    STORAGE = 0
    WORDS = 1


class Tactic(IntEnum):
    """How a product is computed; AUTO weighs the others."""

    AUTO = 0
    ANY_SIZE = 1
    FEW_TOKENS = 2
    TILE_128_256 = 3
    TILE_128_128 = 4
    TILE_64_256 = 5
    TILE_64_192 = 6
    TILE_64_128 = 7


_i32, _i64, _pointer, _float = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class Tokens(ctypes.Structure):
    """token = outer * inner_count + inner."""

    _fields_ = (("outer_count", _i64), ("inner_count", _i64))


class Modulation(ctypes.Structure):
    """A row of channels for every token, at data + outer * outer_stride + inner * inner_stride elements."""

    _fields_ = (("data", _pointer), ("outer_stride", _i64), ("inner_stride", _i64))


class Rotation(ctypes.Structure):
    """LrqRotation."""

    _fields_ = (
        ("x", _pointer), ("scale", Modulation), ("shift", Modulation), ("signs", _pointer), ("y", _pointer),
        ("token_scales", _pointer), ("tokens", Tokens), ("channels", _i64), ("block", _i32), ("prologue", _i32),
        ("epsilon", _float), ("type", _i32), ("act_bits", _i32),
    )  # fmt: skip


class Weight(ctypes.Structure):
    """LrqWeight."""

    _fields_ = (
        ("codes", _pointer), ("levels", _pointer), ("rows", _i64), ("cols", _i64), ("group_size", _i64),
        ("format", _i32), ("layout", _i32), ("bits", _i32), ("fraction_bits", _i32), ("integer_bits", _i32),
    )  # fmt: skip


class Linear(ctypes.Structure):
    """LrqLinear."""

    _fields_ = (
        ("x", _pointer), ("quantized", _pointer), ("token_scales", _pointer), ("weight", Weight),
        ("decoded", _pointer), ("row_scales", _pointer), ("bias", _pointer), ("gate", Modulation),
        ("residual", _pointer), ("y", _pointer), ("tokens", Tokens), ("signs", _pointer), ("block", _i32),
        ("type", _i32), ("act_bits", _i32), ("tactic", _i32),
    )  # fmt: skip


def split_tokens(lead: Sequence[int], shapes: Sequence[Sequence[int]]) -> tuple[Tokens, list[tuple[int, int]]] | None:
    """Number tokens (*lead,) so that each of `shapes` is one row of channels for every (outer, inner).

    shapes: of contiguous tensors (..., channels) that broadcast to (*lead, channels). Returns the tokens and the
    strides (outer, inner) of each, in elements; None if no cut of `lead` in two serves them all: copy one to full size.
    """
    for cut in range(len(lead) + 1):
        outer, inner = lead[:cut], lead[cut:]
        strides = [_strides(outer, inner, shape) for shape in shapes]
        if None not in strides:
            return Tokens(math.prod(outer), math.prod(inner)), strides
    return None


def _strides(outer: Sequence[int], inner: Sequence[int], shape: Sequence[int]) -> tuple[int, int] | None:
    """The strides of one shape, None if it varies over a part of `outer` or `inner` only."""
    channels, own = shape[-1], [1] * (len(outer) + len(inner) + 1 - len(shape)) + list(shape[:-1])
    varies = []
    for part, sizes in ((outer, own[: len(outer)]), (inner, own[len(outer) :])):
        if all(size == 1 for size in sizes):
            varies.append(False)
        elif list(sizes) == list(part):
            varies.append(True)
        else:
            return None
    inner_stride = channels if varies[1] else 0
    return (math.prod(own[len(outer) :]) * channels if varies[0] else 0), inner_stride


STRUCTS = (Tokens, Modulation, Rotation, Weight, Linear)


def find_library(path: Path | None = None) -> Path:
    """Where liblrq_kernels is: the argument, $LRQ_KERNELS, beside the plugins that $LRQ_PLUGINS or a build has."""
    named = path or os.environ.get(ENVIRONMENT)
    if named is not None:
        plugins.check_code(Path(named))
        return Path(named)
    built = plugins.find_library() or plugins.default_folder() / "lib" / plugins.LIBRARY
    beside = built.parent / plugins.KERNELS
    if not beside.is_file():
        raise MissingError(
            f"{plugins.KERNELS} has not been built",
            hint=f"run `lrq-export plugins build`, or name the library in ${ENVIRONMENT}",
        )
    return beside


class Kernels:
    """A loaded library. Addresses are of the memory it runs on, a stream is a cudaStream_t or None for the default."""

    def __init__(self, path: Path):
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise MissingError(f"{path}: cannot be loaded ({error})") from error
        self.path = path
        self._library.lrqKernelsError.restype = ctypes.c_char_p
        self._library.lrqLinearWorkspace.restype = _i64
        self._library.lrqLinearWorkspace.argtypes = (ctypes.POINTER(Linear),)
        self._library.lrqRotate.argtypes = (ctypes.POINTER(Rotation), _pointer)
        self._library.lrqDecode.argtypes = (ctypes.POINTER(Weight), _pointer, _pointer)
        self._library.lrqDequantize.argtypes = (ctypes.POINTER(Weight), _pointer, _pointer, _pointer)
        self._library.lrqLinear.argtypes = (ctypes.POINTER(Linear), _pointer, _i64, _pointer)
        sizes, needed = self._numbers("lrqKernelsStructSizes"), [ctypes.sizeof(struct) for struct in STRUCTS]
        if sizes != needed:
            raise MissingError(f"{path}: its structs have {sizes} bytes, needed {needed}", hint="build it anew")

    def architectures(self) -> list[int]:
        """The compute capabilities compiled in: 80, 86, ..."""
        return self._numbers("lrqKernelsArchitectures")

    def rotate(self, rotation: Rotation, stream: int | None = None) -> None:
        self._call("lrqRotate", ctypes.byref(rotation), stream)

    def decode(self, weight: Weight, decoded: int | None, stream: int | None = None) -> None:
        self._call("lrqDecode", ctypes.byref(weight), decoded, stream)

    def dequantize(self, weight: Weight, scale: int | None, dequantized: int | None, stream: int | None = None) -> None:
        self._call("lrqDequantize", ctypes.byref(weight), scale, dequantized, stream)

    def workspace(self, linear: Linear) -> int:
        """Bytes of workspace that `linear` needs, the same on every device."""
        size = self._library.lrqLinearWorkspace(ctypes.byref(linear))
        if size < 0:
            raise KernelError("lrqLinearWorkspace", size, self._error())
        return size

    def linear(self, linear: Linear, workspace: int | None, workspace_bytes: int, stream: int | None = None) -> None:
        self._call("lrqLinear", ctypes.byref(linear), workspace, workspace_bytes, stream)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != Status.OK:
            raise KernelError(function, status, self._error())

    def _error(self) -> str:
        return self._library.lrqKernelsError().decode(errors="replace")

    def _numbers(self, function: str) -> list[int]:
        """All that a function gives which fills an array and returns how long it is."""
        give = getattr(self._library, function)
        array = (_i32 * give(None, 0))()
        give(array, len(array))
        return list(array)
