"""Libraries of plugins as Triton needs them: it opens one, and what that needs must lie beside it."""

from pathlib import Path

from lrq_export.doctor.elf import read_library

_OURS, _NVINFER = "liblrq_", "libnvinfer.so"


def registers_itself(library: Path) -> bool:
    """Whether it registers its plugins when it is opened, for which it must link TensorRT's registry."""
    return any(name.startswith(_NVINFER) for name in _needed(library))


def with_companions(library: Path) -> list[Path]:
    """The library and those of ours beside it that it needs, and that these need: the plugins and the kernels."""
    found = [library]
    for each in found:  # which grows
        beside = (library.parent / name for name in _needed(each) if name.startswith(_OURS))
        found += [path for path in beside if path.is_file() and path not in found]
    return found


def _needed(library: Path) -> tuple[str, ...]:
    """Nothing of a file that is no library: it may be one for another system."""
    try:
        return read_library(library).needed
    except ValueError:
        return ()
