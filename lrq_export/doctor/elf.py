"""What a shared library needs and what it offers, read from the file: to load it would run its code."""

import struct
from dataclasses import dataclass
from pathlib import Path

_SECTION_DYNAMIC, _SECTION_SYMBOLS = 6, 11  # section types DYNAMIC and DYNSYM
_NEEDED = 1  # dynamic tag
_UNDEFINED = 0  # section of a symbol that is taken from elsewhere
_MOST_SECTIONS, _MOST_BYTES = 10_000, 64 << 20


@dataclass(frozen=True)
class SharedLibrary:
    """Names of the libraries that one needs, and of the symbols that it exports."""

    needed: tuple[str, ...]
    exported: frozenset[str]


def read_library(path: Path) -> SharedLibrary:
    """Raises ValueError, saying what it is, for anything but a 64-bit little-endian ELF library."""
    try:
        with open(path, "rb") as file:
            return _read(file)
    except (OSError, struct.error, IndexError) as error:
        raise ValueError(f"cannot be read as a shared library: {error}") from error


def _read(file) -> SharedLibrary:
    header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":
        raise ValueError("is no 64-bit shared library of Linux")
    (sections_at,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, count = struct.unpack_from("<HH", header, 0x3A)
    if entry_size != 64 or count > _MOST_SECTIONS:
        raise ValueError("has a damaged section table")
    file.seek(sections_at)
    table = file.read(64 * count)
    # Of each: type, offset, size, link (the section of its strings).
    sections = [
        (struct.unpack_from("<I", table, 64 * i + 4)[0], *struct.unpack_from("<QQI", table, 64 * i + 24))
        for i in range(count)
    ]

    def content(index: int) -> bytes:
        _, offset, size, _ = sections[index]
        if size > _MOST_BYTES:
            raise ValueError(f"has a section of {size} bytes")
        file.seek(offset)
        return file.read(size)

    needed, exported = [], set()
    for index, (kind, _, _, link) in enumerate(sections):
        if kind == _SECTION_DYNAMIC:
            strings = content(link)
            entries = struct.iter_unpack("<QQ", content(index))
            needed += [_string(strings, value) for tag, value in entries if tag == _NEEDED]
        elif kind == _SECTION_SYMBOLS:
            strings = content(link)
            symbols = struct.iter_unpack("<IBBHQQ", content(index))
            exported |= {_string(strings, name) for name, _, _, home, _, _ in symbols if home != _UNDEFINED}
    return SharedLibrary(tuple(needed), frozenset(exported))


def _string(strings: bytes, place: int) -> str:
    return strings[place : strings.index(b"\0", place)].decode("utf-8", "replace")
