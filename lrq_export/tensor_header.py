"""The header of a safetensors file: names, types, shapes and places, checked before anything maps the data.

Needs no torch, so that a file can be refused before torch is loaded.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrq_export.errors import InputError
from lrq_export.untrusted_json import MOST_BYTES, json_object

LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header: u64, little endian
# safetensors' dtype codes that torch can hold, and the bytes of a value; the sub-byte floats are left out.
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MOST_AXES = 64
CONVERT = "convert it to safetensors: load it with diffusers, then save_pretrained(folder, safe_serialization=True)"

# What a file that is no safetensors starts with, and what to do about it.
IMPOSTORS = (
    (b"version https://git-lfs", "it is a Git LFS pointer: run git lfs pull"),
    (b"PK\x03\x04", f"it is a pickled torch file: {CONVERT}"),
    (b"\x80\x02", f"it is a pickle: {CONVERT}"),
    (b"<", "it is a web page: download the file itself"),
)


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of a file: dtype code, shape, and its bytes [begin, end) counted from the end of the header."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, str], dict[str, HeaderEntry]]:
    """(metadata, entries by name). Raises InputError when the file is not a whole, well-formed safetensors file."""
    header, data_bytes = _header(path)
    metadata = _metadata(path, header.pop("__metadata__", {}))
    entries = {name: _entry(path, name, raw) for name, raw in header.items()}
    _check_layout(path, entries, data_bytes)
    return metadata, entries


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(JSON header, bytes of data after it), with every length checked against the file's size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            if size < LENGTH_BYTES or not 2 <= length <= MOST_BYTES:
                file.seek(0)
                raise _not_safetensors(path, size, file.read(64), length)
            if LENGTH_BYTES + length > size:
                raise _truncated(path, size, LENGTH_BYTES + length, "for the header alone")
            header = json_object(file.read(length), f"{path}: header")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", hint="check the file") from error
    return header, size - LENGTH_BYTES - length


def _not_safetensors(path: Path, size: int, start: bytes, length: int) -> InputError:
    hint = next((hint for prefix, hint in IMPOSTORS if start.lstrip().startswith(prefix)), "fetch the file again")
    if size < LENGTH_BYTES:
        return InputError(f"{path}: got {size} bytes, needed at least {LENGTH_BYTES} of a safetensors file", hint=hint)
    return InputError(
        f"{path}: not a safetensors file: got a header of {length} bytes, needed 2 to {MOST_BYTES}", hint=hint
    )


def _truncated(path: Path, size: int, needed: int, what: str) -> InputError:
    return InputError(f"{path}: truncated: got {size} bytes, needed {needed} {what}", hint="fetch the file again")


def _metadata(path: Path, raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise InputError(f"{path}: __metadata__: needed an object of strings", hint="fetch the file again")
    return raw


def _entry(path: Path, name: str, raw: Any) -> HeaderEntry:
    """One checked entry of a header: a known dtype, a shape, and as many bytes as they take."""
    fields = raw if isinstance(raw, dict) else {}
    code, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in ITEM_BYTES:
        raise InputError(
            f"{path}: {name}: got dtype {reprlib.repr(code)}, needed one of {', '.join(ITEM_BYTES)}", hint="convert it"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InputError(
            f"{path}: {name}: got shape {reprlib.repr(shape)} at {reprlib.repr(offsets)}, needed lists of sizes",
            hint="fetch the file again",
        )
    if len(fields) > 3:
        raise InputError(
            f"{path}: {name}: got {reprlib.repr(sorted(fields))}, needed dtype, shape and data_offsets alone",
            hint="fetch the file again",
        )
    begin, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[code]
    if end - begin != needed:
        raise InputError(
            f"{path}: {name}: got {end - begin} bytes, needed {needed} for {code} of shape {tuple(shape)}",
            hint="fetch the file again",
        )
    return HeaderEntry(code, tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    few = isinstance(value, list) and len(value) <= MOST_AXES  # the product of a million sizes takes hours
    return few and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, entries: Mapping[str, HeaderEntry], data_bytes: int) -> None:
    """Raise InputError unless the tensors follow one another and end where the file does."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise InputError(
                f"{path}: {name}: got data at offset {entry.begin}, needed {end}", hint="fetch the file again"
            )
        end = entry.end
    if data_bytes < end:
        size = path.stat().st_size
        raise _truncated(path, size, size - data_bytes + end, f"for {len(entries)} tensors")
    if data_bytes > end:
        raise InputError(
            f"{path}: got {data_bytes - end} bytes after the last tensor, needed none", hint="fetch the file again"
        )
