"""The package folder on disk: its files, atomic writes, the manifest that seals it, and the swap that publishes it.

A reader sees a file whole or not at all, and a package old or new, never half of each:

- one file: written under a temporary name in its folder, fsync, rename, fsync of the folder;
- the package: built in OUT.partial/package, then OUT -> OUT.previous and OUT.partial/package -> OUT. A build killed
  between the two renames leaves OUT.previous whole, and the next build puts it back.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import reprlib
import shutil
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lrq_export.errors import InputError, MissingError
from lrq_export.tensor_header import LENGTH_BYTES
from lrq_export.untrusted_json import json_object, read_bounded, read_json_object

if TYPE_CHECKING:
    import torch

FORMAT = "lrq-export package"
SCHEMA = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.toml"
STATS = "stats.safetensors"
QUANTIZED = "quantized.safetensors"
MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
GRAPHS = "graphs"  # the graph after trace and after each pass
ENGINE = "engine"
ONNXRUNTIME_ENGINE = "engine/onnxruntime"
REPORT = "report.json"
REPORT_PAGE = "report.html"
# Hold timings, so they differ between two builds of the same inputs; no other file may.
TIMED_FILES = frozenset({REPORT, REPORT_PAGE})
TIMED_ENGINES = "engine/tensorrt"  # begins the names of engines whose kernels were chosen by a clock

TEMPORARY = ".lrq-writing"  # suffix of a file that is not finished
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ENCODER = json.JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
WRITABLE_BY_ALL = stat.S_IWOTH
MOST_FILES, MOST_FOLDERS_DEEP = 10_000, 16  # of a package
LARGE = 1 << 30  # bytes from which a file must not be holes, which cost its author nothing and its reader hours


class CountingWriter(io.BufferedWriter):
    """A buffered file that counts the bytes it was asked to hold."""

    asked = 0

    def write(self, data: Any) -> int:
        # Counted first: when the disk is full, the write that fails is part of what was needed.
        self.asked += memoryview(data).nbytes
        return super().write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[CountingWriter]:
    """A binary file that appears at `path`, whole and flushed to disk, when the block ends without an error.

    On any error the temporary file is removed and what was at `path` is untouched.
    Raises MissingError when the disk, a quota or a file-size limit is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    file: CountingWriter | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        file = CountingWriter(io.FileIO(temporary, "xb"))
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        _discard(temporary, file)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise disk_full(path, file.asked if file else 0, error) from error
        raise


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, whole or not at all. Raises MissingError on a full disk."""
    with atomic_file(path) as file:
        file.write(data)


def json_bytes(value: Any) -> bytes:
    """The one spelling of a JSON value in a package: sorted keys, two spaces, UTF-8, a line end. No NaN."""
    return (_ENCODER.encode(value) + "\n").encode("utf-8")


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `json_bytes(value)`. Raises ValueError for NaN, which JSON cannot hold, and MissingError on a full disk."""
    write_bytes_atomic(path, json_bytes(value))


def save_tensors_atomic(
    path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whose bytes depend on the tensors and metadata alone.

    safetensors' own writer keeps metadata in a hash map, whose order changes between runs; here keys are sorted and
    tensors lie widest dtype first (which keeps each aligned), then by name. One tensor at a time is copied.
    """
    from lrq_export.checkpoint import DTYPES

    codes = {dtype: code for code, dtype in DTYPES.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        code, shape = codes[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % LENGTH_BYTES)  # so that the data starts aligned
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        file.write(text)
        for name in names:
            file.write(tensor_bytes(tensors[name]))


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """A tensor's values as they lie in a file: row-major, in its own dtype; no copy if it already is."""
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Seal a package: write manifest.json with `facts`, and hash and size of every other file. Returns it.

    Takes from everyone but owner and group the right to write, which a umask of 0 leaves them.
    `content_sha256` covers names and bytes of all files but those that clocks have a part in (TIMED_FILES, and engines
    of TensorRT): the same inputs give the same digest.
    Raises ValueError when a fact is NaN or takes a name of the manifest's own.
    """
    own = {"format": FORMAT, "schema": SCHEMA}
    files = {}
    for name in list_files(folder):
        if name != MANIFEST:
            path = folder / name
            files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    own |= {"files": files, "content_sha256": _content_digest(files)}
    clash = own.keys() & facts.keys()
    if clash:
        raise ValueError(f"facts take the manifest's own names {sorted(clash)}")
    manifest = {**facts, **own}
    manifest["manifest_sha256"] = _seal(manifest)
    write_json_atomic(folder / MANIFEST, manifest)
    for path in (folder, *folder.rglob("*")):
        if path.stat().st_mode & WRITABLE_BY_ALL:
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~WRITABLE_BY_ALL)
    return manifest


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a package, unedited. Raises InputError when `folder` holds none or any byte of it was changed."""
    path = Path(folder) / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise _no_manifest(path)
    data = read_bounded(path)
    manifest = json_object(data, str(path))
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: got another format, needed an {FORMAT}", hint="build the package again")
    if manifest.get("schema") != SCHEMA or isinstance(manifest["schema"], bool):  # True is 1
        raise InputError(
            f"{path}: got schema {reprlib.repr(manifest.get('schema'))}, needed {SCHEMA}",
            hint="use the lrq-export that built it",
        )
    if not _is_spelled(manifest, data):
        raise InputError(f"{path}: was edited: lrq-export does not write these bytes", hint="build the package again")
    needed = manifest.get("manifest_sha256")
    got = _seal({key: value for key, value in manifest.items() if key != "manifest_sha256"})
    if got != needed:
        raise _edited(path, got, needed)
    _check_files_table(path, manifest.get("files"))
    return manifest


def verify_hashes(folder: Path) -> dict[str, Any]:
    """Raise InputError naming the first file that was edited, is missing or was added; return the manifest.

    Refuses what everyone may write, too: it could change once its hash was taken. Only files found in the folder are
    opened, so a hostile manifest cannot lead anywhere else; names and sizes are compared before any file is read.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    files, present = manifest["files"], set(list_files(folder)) - {MANIFEST}
    for name in sorted(files.keys() | present):
        path = folder / name
        if name not in present:
            raise InputError(f"{path}: is missing, {MANIFEST} names it", hint="build the package again")
        if name not in files:
            raise InputError(f"{path}: does not belong to the package, {MANIFEST} does not name it", hint="remove it")
        got, needed = path.stat().st_size, files[name]["bytes"]
        if got != needed:
            raise InputError(f"{path}: was edited: got {got} bytes, needed {needed}", hint="build the package again")
    _refuse_writable(folder, files)
    for name in sorted(files):
        path = folder / name
        _refuse_holes(path)
        digest = _digest_of_input(path)
        if digest != files[name]["sha256"]:
            raise _edited(path, digest, files[name]["sha256"])
    return manifest


def list_files(folder: Path) -> list[str]:
    """Every file below `folder` as a relative path with slashes, sorted.

    Raises InputError for a link, a device, a name that is no plain text, and for more than any package holds.
    """
    names: list[str] = []
    folders = [(Path(folder), 0)]
    while folders:
        parent, depth = folders.pop()
        for entry in _entries(parent):
            path = parent / entry.name
            if not entry.name.isprintable() or "\\" in entry.name:
                raise InputError(f"{parent}: holds a file named {entry.name!r}", hint="remove it")
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise InputError(f"{path}: got a link or a device, needed a plain file", hint="remove it")
            if entry.is_dir():
                folders.append((path, depth + 1))
            else:
                names.append(path.relative_to(folder).as_posix())
            if len(names) + len(folders) > MOST_FILES or depth > MOST_FOLDERS_DEEP:
                raise InputError(
                    f"{folder}: holds more than {MOST_FILES} files, or folders nested more than {MOST_FOLDERS_DEEP} "
                    "deep, needed a package",
                    hint="check the path",
                )
    return sorted(names)


def require_free_disk(path: Path, needed: int) -> None:
    """Raise MissingError unless the disk that holds `path` (or will) has `needed` free bytes."""
    free = _free_bytes(path)
    if free < needed:
        raise MissingError(
            f"{path}: got {free} free bytes on its disk, needed {needed}",
            hint=f"free {needed - free} bytes or build elsewhere",
        )


def is_package(folder: Path) -> bool:
    """Whether a folder holds a manifest of ours, edited or not."""
    if (folder / MANIFEST).is_symlink():
        return False
    try:
        return read_json_object(folder / MANIFEST).get("format") == FORMAT
    except InputError:
        return False


def is_plain_relative(name: str) -> bool:
    """Whether a path taken from a file stays below the folder that it is joined to, on any system."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and not set(name) & {"\\", "\0", ":"}


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, so that a rename survives a power cut."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Flush a file's bytes to disk, before it is renamed."""
    _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_manifest(path: Path) -> InputError:
    previous = beside(path.parent, ".previous")
    hint = "build it with lrq-export build SOURCE -o OUT"
    if not path.exists() and previous.exists():
        hint = f"run the same build again, it restores {previous}"
    if any(each.suffix == ".partial" for each in (path.parent, path.parent.parent)):
        hint = "it is what an unfinished build has done so far: run the same build again, without --until"
    problem = "needed a plain file" if os.path.lexists(path) else "No such file"
    return InputError(f"{path.parent}: not an lrq-export package: {MANIFEST}: {problem}", hint=hint)


def _is_spelled(manifest: dict[str, Any], data: bytes) -> bool:
    """Whether `data` is `json_bytes(manifest)`, piece by piece: written out, a hostile one could take gigabytes."""
    place = 0
    try:
        for piece in _ENCODER.iterencode(manifest):
            expected = piece.encode("utf-8")
            if data[place : place + len(expected)] != expected:
                return False
            place += len(expected)
    except (ValueError, RecursionError):  # NaN, half of a surrogate pair, nested without end
        return False
    return data[place:] == b"\n"


def _check_files_table(path: Path, files: Any) -> None:
    """Raise InputError unless `files` maps plain relative paths, each once, to {"sha256": hex, "bytes": int}."""
    if not isinstance(files, dict):
        raise InputError(f"{path}: files: got {type(files).__name__}, needed an object", hint="build the package again")
    known: dict[str, str] = {MANIFEST: MANIFEST}
    for name, facts in files.items():
        if not is_plain_relative(name) or PurePosixPath(name).as_posix() != name:
            raise InputError(
                f"{path}: files: got the path {name!r}, needed one inside the package",
                hint="do not use this package unless you trust its source",
            )
        # One file to a system that ignores case or how accents are composed, two to another.
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name or name == MANIFEST:
            raise InputError(
                f"{path}: files: got {other!r} and {name!r}, which some systems take for one file",
                hint="do not use this package unless you trust its source",
            )
        digest, size = (facts.get("sha256"), facts.get("bytes")) if isinstance(facts, dict) else (None, None)
        if not isinstance(digest, str) or type(size) is not int or size < 0:
            raise InputError(f"{path}: files: {name}: needed sha256 and bytes", hint="build the package again")


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(itertools.islice(entries, MOST_FILES + 1))
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be read: {error.strerror}", hint="check the path and its permissions"
        ) from error


def _refuse_writable(folder: Path, files: Mapping[str, Any]) -> None:
    """Raise InputError for a file or folder of the package that everyone may write."""
    inside = {parent for name in files for parent in PurePosixPath(name).parents}
    for name in (".", MANIFEST, *sorted(map(str, inside)), *files):
        path = folder / name
        if path.stat().st_mode & WRITABLE_BY_ALL:
            raise InputError(
                f"{path}: everyone on this machine may change it, which no hash protects from",
                hint=f"chmod -R o-w {folder}",
            )


def _refuse_holes(path: Path) -> None:
    """Raise InputError for a large file that is hardly there: reading terabytes of nothing takes hours."""
    facts = path.stat()
    if facts.st_size < LARGE:
        return
    stored = facts.st_blocks * 512  # the unit of st_blocks, whatever the disk's
    with open(path, "rb") as file:
        try:
            first = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError as error:  # no data at all; or a file system that cannot tell
            first = facts.st_size if error.errno == errno.ENXIO else 0
    if first >= LARGE or 0 < stored < facts.st_size // 16:
        raise InputError(
            f"{path}: got {facts.st_size} bytes of which {stored} are stored, needed a file that is not empty space",
            hint="fetch the package again",
        )


def _digest_of_input(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error


def _content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    same = [name for name in sorted(files) if name not in TIMED_FILES and not name.startswith(TIMED_ENGINES)]
    lines = [f"{files[name]['sha256']} {name}\n" for name in same]
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    """The manifest's hash of itself, without the field that holds it."""
    return hashlib.sha256(json_bytes(manifest)).hexdigest()


def _edited(path: Path, got: str, needed: Any) -> InputError:
    return InputError(
        f"{path}: was edited: got sha256 {got[:12]}, needed {str(needed)[:12]}", hint="build the package again"
    )


def disk_full(path: Path, asked: int, error: OSError) -> MissingError:
    needed = f"at least {asked} bytes" if asked else "more"
    return MissingError(
        f"{path}: {error.strerror}: got {_free_bytes(path)} free bytes, needed {needed}",
        hint="free disk space or raise the quota, then run the same command: it resumes",
    )


def _free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, or would."""
    path = Path(path).resolve()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _discard(temporary: Path, file: CountingWriter | None) -> None:
    """Close and remove an unfinished file; closing flushes, which fails again on a full disk."""
    with contextlib.suppress(OSError):
        if file is not None:
            file.close()
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def beside(out: Path, suffix: str) -> Path:
    """OUT.partial or OUT.previous; OUT need not exist."""
    out = Path(out).resolve()
    return out.with_name(out.name + suffix)
