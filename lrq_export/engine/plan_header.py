"""What a plan of TensorRT or TensorRT-RTX says of itself in its first bytes, read without their libraries.

    0  4 bytes   the library: "ftrt" or "vtrt"
    4  uint32    version of the layout; 0
    24 4 bytes   major, minor, patch and build of the library that wrote it

So does trtexec's --getPlanVersionOnly read plans of TensorRT; plans of TensorRT-RTX 1.4 and 1.7 begin alike.
"""

from pathlib import Path

from lrq_export.engine.built import RTX, TENSORRT
from lrq_export.errors import InputError

# How an engine starts, by the folder of its target. An engine is for one library, and crashes another.
STARTS = {TENSORRT: (b"ftrt", "TensorRT"), RTX: (b"vtrt", "TensorRT-RTX")}
BYTES = 28
_LAYOUT, _VERSION = slice(4, 8), slice(24, 28)
_KNOWN = bytes(4)


def plan_version(path: Path) -> tuple[int, ...] | None:
    """Which version of its target's library wrote a plan, in four numbers modulo 256; None if its layout is not known.

    Raises InputError for a file that is no plan of the target whose folder it lies in.
    """
    target = path.parent.name
    if target not in STARTS:
        raise InputError(
            f"{path}: got an engine of the unknown target {target}, needed {' or '.join(STARTS)}",
            hint="build it again: lrq-export build PACKAGE --target TARGET",
        )
    start, library = STARTS[target]
    with open(path, "rb") as file:
        header = file.read(BYTES)
    if len(header) < BYTES or not header.startswith(start):
        others = [other for each, other in STARTS.values() if each != start and header.startswith(each)]
        raise InputError(
            f"{path}: got {f'an engine of {others[0]}' if others else 'no engine'}, needed one of {library}",
            hint=f"build it again: lrq-export build {path.parents[2]} --target {target}",
        )
    return tuple(header[_VERSION]) if header[_LAYOUT] == _KNOWN else None
