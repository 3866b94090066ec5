"""Compile the C++ plugins with CMake, and find what was compiled.

Sources are those of the checkout, or what the wheel carries of them. They are compiled into a folder of the user's
cache that is named after their content, so that another version never finds the libraries of this one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrq_export import __version__
from lrq_export.errors import CheckFailed, MissingError, UsageError
from lrq_export.progress import Progress, Silent

LIBRARY, KERNELS = "liblrq_plugins.so", "liblrq_kernels.so"
_OURS = "liblrq_*.so*"
VARIABLE = "LRQ_PLUGINS"  # the library, or its folder
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")
BYTES_PER_JOB = 4 << 30  # what compiling one product for tensor cores takes
_SHOWN_LINES = 15  # of a compiler that failed


@dataclass(frozen=True)
class Built:
    """What a build made: every library, and what it left out and why."""

    libraries: tuple[Path, ...]
    left_out: tuple[str, ...]


def sources() -> Path:
    """The folder of the C++ sources. Raises MissingError for an installation without them."""
    here = Path(__file__).resolve().parent
    for folder in (here / "plugin_sources", here.parent / "plugins"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise MissingError(
        "this installation of lrq-export has no C++ sources", hint="install it from its wheel, or from a checkout"
    )


def default_folder() -> Path:
    """Where these sources are compiled unless another folder is named."""
    digest = hashlib.sha256()
    folder = sources()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lrq-export" / "plugins" / f"{__version__}-{digest.hexdigest()[:12]}"


def find_library() -> Path | None:
    """The plugins to load: what LRQ_PLUGINS names, else what `build` made of these sources; None if it has not yet.

    Raises MissingError if LRQ_PLUGINS names nothing that is there, or for one that everyone may change.
    """
    found = _named_or_built()
    if found is not None:
        check_code(found)
    return found


def check_code(library: Path) -> None:
    """Raise MissingError if everyone on this machine may change what is loaded with a library.

    That is the file, ours beside it, which it needs, and any folder on the way to them, through links, too. In one with
    the sticky bit, such as /tmp, nobody can move what is another's.
    """
    if not library.is_file():
        raise MissingError(f"{library}: there is no such library", hint="build it with lrq-export plugins build")
    beside = [path for place in _ways(library) for path in place.parent.glob(_OURS) if path.exists()]
    places = list(dict.fromkeys(place for path in (library, *beside) for place in _ways(path)))
    own = dict.fromkeys(path for place in places for path in (place.resolve(), place, place.parent))
    changeable = [path for path in own if _mode(path) & stat.S_IWOTH]
    for folder in dict.fromkeys(parent for place in places for parent in place.parent.parents):
        if _mode(folder) & stat.S_IWOTH and not _mode(folder) & stat.S_ISVTX:
            changeable.append(folder)
    if changeable:
        raise MissingError(
            f"{changeable[0]}: everyone on this machine may change it, and {library.name} is code",
            hint=f"chmod o-w {changeable[0]}",
        )


def _ways(path: Path) -> list[Path]:
    """A file that is there, by every name by which the system finds it: its own, then with link after link gone."""
    ways = [path.absolute()]
    for way in ways:  # which grows
        link = next((each for each in (*reversed(way.parents), way) if each.is_symlink()), None)
        if link is not None:
            ways.append(link.parent / os.readlink(link) / way.relative_to(link))
    return ways


def _mode(path: Path) -> int:
    return path.stat().st_mode


def _named_or_built() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named) / LIBRARY if Path(named).is_dir() else Path(named)
        if not path.is_file():
            raise MissingError(
                f"{VARIABLE}: {path} is not there", hint=f"name {LIBRARY} or its folder, or unset {VARIABLE}"
            )
        return path
    built = default_folder() / "lib" / LIBRARY
    return built if built.is_file() else None


def build(
    out: Path | None = None,
    *,
    architectures: Sequence[str] | None = None,
    options: Sequence[str] = (),
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Built:
    """Compile kernels and plugins into `out`/lib. A second call compiles only what changed.

    `architectures`: those of the GPUs to run on; default: of the GPUs in this machine, or all where there is none.
    `options`: more definitions for CMake, NAME=VALUE. `jobs`: compilers at once; default: as memory allows.
    Raises MissingError, naming what to install, if a tool, CUDA or TensorRT's headers are missing; CheckFailed if a
    compiler refuses the sources.
    """
    source, folder, progress = sources(), (out or default_folder()).resolve(), progress or Silent()
    cmake = _tool("cmake", "pip install cmake")
    compiler = os.environ.get("CXX", "c++")
    _tool(compiler, "install a C++ compiler, e.g. g++")
    chosen = _architectures(architectures)
    definitions = [
        f"LRQ_CUDA_ARCHITECTURES={';'.join(chosen)}",
        f"CMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'lib'}",
        f"Python3_EXECUTABLE={sys.executable}",
        *_tensorrt_of_pip(),
        *options,
    ]
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    configure = [cmake, "-S", str(source), "-B", str(folder / "build"), *(f"-D{each}" for each in definitions)]
    said = list(_lines(configure, "configuring"))
    left_out = tuple(match[1] for line in said if (match := re.match(r"-- (\w+: left out: .*)", line)))
    if any(each.startswith("kernels:") for each in left_out):
        _compile(cmake, folder / "build", jobs or _jobs(), progress)  # the core alone, which needs a C++ compiler
    for part in ("kernels", "trt"):
        reason = next((each.partition("left out: ")[2] for each in left_out if each.startswith(f"{part}:")), None)
        if reason is not None:
            what, _, fix = reason.partition(" (")
            raise MissingError(f"plugins: {what}", hint=fix.removesuffix(")") or None)
    _compile(cmake, folder / "build", jobs or _jobs(), progress)
    return Built(tuple(sorted((folder / "lib").glob("*.so"))), left_out)


def _compile(cmake: str, folder: Path, jobs: int, progress: Progress) -> None:
    """Run the compilers, one step of the bar a percent: both of CMake's usual generators say how far they are."""
    progress.begin("plugins", 100)
    shown = 0
    for line in _lines([cmake, "--build", str(folder), "--parallel", str(jobs)], "compiling"):
        done = _percent(line)
        for _ in range(shown, done):
            progress.advance(line.rpartition(" ")[2].rpartition("/")[2])
        shown = max(shown, done)
    progress.end("plugins", 0.0)


def _percent(line: str) -> int:
    """How far `line` says that the build is, in percent; 0 if it does not."""
    if match := re.match(r"\[ *(\d+)%\]", line):
        return int(match[1])
    if match := re.match(r"\[(\d+)/(\d+)\]", line):
        return 100 * int(match[1]) // int(match[2])
    return 0


def _lines(command: list[str], what: str) -> Iterator[str]:
    """What a command prints, line by line. Raises CheckFailed with the end of it if the command fails."""
    last: deque[str] = deque(maxlen=_SHOWN_LINES)
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1
    )
    try:
        for line in running.stdout:
            last.append(line.rstrip())
            yield last[-1]
    finally:
        if running.poll() is None and sys.exc_info()[0] is not None:
            running.terminate()
        running.wait()
    if running.returncode != 0:
        raise CheckFailed(
            f"{what} the plugins failed: {' | '.join(line.strip() for line in last if line.strip())}",
            hint="the plugins need a C++17 compiler and CUDA 12.8 or newer",
        )


def _tool(name: str, hint: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MissingError(f"plugins: {name} is not installed", hint=hint)
    return found


def _architectures(given: Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return _of_this_machine() or ARCHITECTURES
    unknown = [each for each in given if each not in ARCHITECTURES]
    if unknown or not given:
        raise UsageError(
            f"--architectures: got {', '.join(unknown) or 'none'}, needed some of {', '.join(ARCHITECTURES)}"
        )
    return tuple(dict.fromkeys(given))


def _of_this_machine() -> tuple[str, ...]:
    """The architectures of the GPUs here; none if there is no GPU, or one that none of ours is made for."""
    query = shutil.which("nvidia-smi")
    if query is None:
        return ()
    asked = subprocess.run([query, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    plain = {each.rstrip("a"): each for each in ARCHITECTURES}
    found = [plain.get(line.strip().replace(".", "")) for line in asked.stdout.splitlines()]
    return () if asked.returncode != 0 or None in found else tuple(dict.fromkeys(found))


def _tensorrt_of_pip() -> list[str]:
    """libnvinfer of the Python package, which is in no place where CMake looks."""
    from importlib.util import find_spec

    spec = find_spec("tensorrt_libs")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = sorted(path for folder in folders for path in Path(folder).glob("libnvinfer.so.*"))
    return [f"LRQ_NVINFER={found[-1]}"] if found else []


def _jobs() -> int:
    """As many compilers as there are cores, and memory for."""
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, pages * size // BYTES_PER_JOB))
