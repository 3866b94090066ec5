"""plugins/core behind ctypes, compiled with g++: for tools/check_decode.py and the tests of plugins/core."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphs import names
from graphs.ops import packing, words

CORE = Path(__file__).resolve().parents[1] / "plugins" / "core"
# Contraction would round sums of products once where they are defined as rounded twice.
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")
i32, u32, i64, f32, pointer = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

OK, NULL_POINTER, BAD_BITS, BAD_SIZE, BAD_GROUP, BAD_LEVELS, BAD_FORMAT, BAD_BLOCK, BAD_VALUE = range(9)
INT8 = "int8"
FORMATS = {names.TWIN_LOG: 0, names.CODEBOOK: 1, INT8: 2}
LAYOUTS = {names.STORAGE: 0, names.WORDS: 1}
PROLOGUES = {
    "HadamardRotate": 0, "LayerNormRotate": 1, "RMSNormRotate": 2,
    "GeluRotate": 3, "GeluTanhRotate": 4, "SiluRotate": 5, "GegluRotate": 6,
}  # fmt: skip


class PackedWeight(ctypes.Structure):
    """LrqPackedWeight of c_api.h."""

    _fields_ = (
        ("codes", pointer), ("codes_bytes", i64), ("levels", pointer), ("levels_bytes", i64),
        ("rows", i64), ("cols", i64), ("group_size", i64),
        ("format", i32), ("layout", i32), ("bits", i32), ("fraction_bits", i32), ("integer_bits", i32),
    )  # fmt: skip


class TokenRotation(ctypes.Structure):
    """LrqTokenRotation of c_api.h."""

    _fields_ = (
        ("x", pointer), ("scale", pointer), ("shift", pointer), ("signs", pointer),
        ("tokens", i64), ("channels", i64), ("block", i64), ("prologue", i32), ("epsilon", f32),
    )  # fmt: skip


class Product(ctypes.Structure):
    """LrqProduct of c_api.h."""

    _fields_ = (
        ("activations", pointer), ("token_scales", pointer), ("weight", pointer), ("row_scales", pointer),
        ("bias", pointer), ("gate", pointer), ("residual", pointer), ("tokens", i64), ("rows", i64), ("cols", i64),
    )  # fmt: skip


ARGUMENTS = {
    "lrqStatusText": (i32,),
    "lrqPackCodes": (pointer, i64, i64, i32, i32, pointer, i64),
    "lrqUnpackCodes": (pointer, pointer),
    "lrqDecodeByShifts": (pointer, pointer),
    "lrqDecodeByTable": (pointer, pointer),
    "lrqDecodeByWords": (pointer, pointer),
    "lrqPermuteBytes": (u32, u32, u32),
    "lrqExpandTables": (pointer, pointer),
    "lrqHadamardMatrix": (i32, i32, pointer, i64),
    "lrqHadamardFactors": (i64, pointer),
    "lrqRotateTokens": (pointer, pointer),
    "lrqQuantizeTokens": (pointer, i64, i64, i32, pointer, pointer),
    "lrqTokenProduct": (pointer, pointer),
}


def compile_core(folder: Path, options: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of all of plugins/core. Raises CalledProcessError if it does not compile without a warning."""
    library = folder / "liblrq_core.so"
    sources = [str(source) for source in sorted(CORE.glob("*.cpp"))]
    subprocess.run(["g++", *FLAGS, *options, "-shared", "-fPIC", *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name, arguments in ARGUMENTS.items():
        getattr(loaded, name).argtypes = arguments
    loaded.lrqStatusText.restype = ctypes.c_char_p
    loaded.lrqPermuteBytes.restype = u32
    return loaded


def address(array: np.ndarray | None) -> int | None:
    """Where a C-contiguous array begins; None is the null pointer."""
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} is not contiguous")
    return array.ctypes.data


def call(core: ctypes.CDLL, function: str, *arguments: object) -> None:
    """Raises ValueError with the text of the status if it is not 0."""
    status = getattr(core, function)(*arguments)
    if status != OK:
        raise ValueError(f"{function}: {core.lrqStatusText(status).decode()}")


@dataclass(frozen=True)
class Weight:
    """A weight as its op holds it: raw codes uint8 (bytes,), and levels int8, exponents or table (empty for INT8)."""

    format: str
    layout: str
    raw: np.ndarray
    levels: np.ndarray
    rows: int
    cols: int
    group_size: int
    bits: int

    def struct(self, **changes: int | None) -> PackedWeight:
        """What C sees, with some fields changed. Valid as long as this object lives."""
        fields = {
            "codes": address(self.raw), "codes_bytes": self.raw.nbytes,
            "levels": address(self.levels), "levels_bytes": self.levels.nbytes,
            "rows": self.rows, "cols": self.cols, "group_size": self.group_size,
            "format": FORMATS[self.format], "layout": LAYOUTS[self.layout], "bits": self.bits,
            "fraction_bits": names.FRACTION_BITS, "integer_bits": names.INTEGER_BITS,
        }  # fmt: skip
        return PackedWeight(**fields | changes)

    def decode(self, core: ctypes.CDLL, function: str, **changes: int | None) -> np.ndarray:
        """w (rows, cols) int8 by lrqDecodeByShifts, lrqDecodeByTable or lrqDecodeByWords."""
        decoded = np.empty((self.rows, self.cols), np.int8)
        call(core, function, ctypes.byref(self.struct(**changes)), address(decoded))
        return decoded


def packed_weight(
    codes: np.ndarray, levels: np.ndarray, *, bits: int, group_size: int, layout: str = names.STORAGE
) -> Weight:
    """The weight of codes (rows, cols); levels of four axes are exponents, of three a table."""
    packed = words.prepack(codes, bits) if layout == names.WORDS else packing.pack(codes, bits).raw
    raw = np.frombuffer(packed, np.uint8).copy()
    form = names.TWIN_LOG if levels.ndim == 4 else names.CODEBOOK
    return Weight(form, layout, raw, np.ascontiguousarray(levels), *codes.shape, group_size, bits)


def int8_weight(integers: np.ndarray) -> Weight:
    """The weight of integers (rows, cols) int8."""
    raw = np.ascontiguousarray(integers).view(np.uint8)
    return Weight(INT8, names.STORAGE, raw, np.empty(0, np.int8), *integers.shape, 0, names.INT8_BITS)
