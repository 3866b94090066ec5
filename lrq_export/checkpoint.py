"""A diffusers checkpoint on disk, read one tensor at a time.

`open_checkpoint` looks at names, shapes and dtypes only; `Checkpoint.read` maps the file, hands out one tensor and lets
the mapping go with it, so a 12-billion-parameter model is never in memory whole. Every file is checked before
anything maps it: a truncated, renamed or hostile file is one InputError, never a crash in a reader below.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lrq_export.errors import InputError
from lrq_export.package import is_plain_relative
from lrq_export.recipe import nearest
from lrq_export.tensor_header import CONVERT, read_header
from lrq_export.untrusted_json import read_json_object

# By safetensors' codes; those of `tensor_header.ITEM_BYTES`.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

CONFIG = "config.json"
PIPELINE_INDEX = "model_index.json"
TRANSFORMER = "transformer"
WEIGHTS = "diffusion_pytorch_model"
# Full precision first: a variant is a rounded copy.
SINGLE_FILES = tuple(f"{WEIGHTS}{variant}.safetensors" for variant in ("", ".bf16", ".fp16"))
INDEX_FILES = (
    f"{WEIGHTS}.safetensors.index.json",
    *(f"{WEIGHTS}.safetensors.index.{variant}.json" for variant in ("bf16", "fp16")),
    *(f"{WEIGHTS}.{variant}.safetensors.index.json" for variant in ("bf16", "fp16")),
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """One checked safetensors file: `.path`, `.entries` by name, `.metadata`; `read` maps one tensor.

    Raises InputError when the file is not a whole, well-formed safetensors file.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.metadata, entries = read_header(self.path)
        self.entries = {name: Entry(DTYPES[each.code], each.shape) for name, each in entries.items()}

    def entry(self, name: str) -> Entry:
        """Raises InputError for a name that the file does not have."""
        require_name(name, self.entries, str(self.path))
        return self.entries[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype. The mapping lives as long as the tensor. Raises InputError."""
        self.entry(name)
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self.path}: {name}: cannot be read: {_one_line(error)}", hint="fetch the file again"
            ) from error

    def read_all(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, for files that fit in memory."""
        return {name: self.read(name) for name in self.entries}


@dataclass(frozen=True)
class Checkpoint:
    """An opened transformer folder; `pipeline_path` is the pipeline's folder when it was opened through one."""

    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    pipeline_path: Path | None
    _home: Mapping[str, TensorFile]  # by tensor name

    @property
    def class_name(self) -> str:
        return self.config["_class_name"]

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file, in its own dtype. Raises InputError."""
        self._entry(name)
        return self._home[name].read(name)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the config's and every weight file's name, size and bytes; read once, then remembered."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in (self.path / CONFIG, *self.files):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _entry(self, name: str) -> Entry:
        require_name(name, self._home, str(self.path))
        return self._home[name].entries[name]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a transformer folder (config.json), or the transformer of a whole pipeline folder (model_index.json).

    Raises InputError, saying which file is missing, damaged or leads out of the folder.
    """
    given = Path(path)
    if not given.is_dir():
        problem = "is a file" if given.exists() else "does not exist"
        raise InputError(
            f"{given}: got a path that {problem}, needed a folder in diffusers layout",
            hint=f"pass the folder that holds {CONFIG} or {PIPELINE_INDEX}",
        )
    root = given.resolve()
    pipeline_path = None
    if not (root / CONFIG).exists() and (root / PIPELINE_INDEX).exists():
        pipeline_path = root
    folder = _transformer_folder(root) if pipeline_path else root
    config = _read_config(folder, root)
    files = _weight_files(folder, root)
    return Checkpoint(folder, config, tuple(file.path for file in files), pipeline_path, _homes(files))


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, Sequence[int]]) -> None:
    """Raise InputError unless the checkpoint holds exactly the expected names, each in the expected shape."""
    names = checkpoint.names()
    missing = sorted(expected.keys() - set(names))
    extra = sorted(set(names) - expected.keys())
    if missing:
        near = nearest(missing[0], extra)
        raise InputError(
            f"{checkpoint.path}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)",
            hint=f"the nearest name that is there is {near}"
            if near
            else f"check that {CONFIG} belongs to these weights",
        )
    if extra:
        near = nearest(extra[0], expected)
        raise InputError(
            f"{checkpoint.path}: tensor {extra[0]} is unknown to {checkpoint.class_name} ({len(extra)} are)",
            hint=f"the nearest known name is {near}" if near else f"check that {CONFIG} belongs to these weights",
        )
    for name in names:
        if not checkpoint.dtype(name).is_floating_point:
            raise InputError(
                f"{checkpoint.path}: {name}: got {checkpoint.dtype(name)}, needed floating-point weights",
                hint="pass the original checkpoint, not a quantized one",
            )
        got, needed = checkpoint.shape(name), tuple(expected[name])
        if got != needed:
            raise InputError(
                f"{checkpoint.path}: {name}: got shape {got}, needed {needed}",
                hint=f"check that {CONFIG} belongs to these weights",
            )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise InputError when a floating-point tensor holds a NaN or an infinity, saying how many and where first."""
    if not tensor.is_floating_point():
        return
    # Two bytes a value are enough to tell, and the 1-byte floats have no isfinite of their own.
    bad = ~torch.isfinite(tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor)
    if not bool(bad.any()):
        return
    first = tuple(int(index) for index in bad.nonzero()[0])
    value = "NaN" if bool(tensor[first].isnan()) else "Inf"
    raise InputError(
        f"{name}: got {int(bad.sum())} NaN or Inf among {tensor.numel()} values, the first {value} at {list(first)}, "
        "needed finite values",
        hint="train or convert the source again",
    )


def require_name(name: str, known: Iterable[str], where: str) -> None:
    """Raise InputError when `name` is not among the tensors of `where`, naming the nearest."""
    if name in known:
        return
    near = nearest(name, known)
    raise InputError(f"{where}: no tensor {name}", hint=f"the nearest name is {near}" if near else "check the file")


def _transformer_folder(root: Path) -> Path:
    folder = root / TRANSFORMER
    if not folder.is_dir():
        parts = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) or "no folders"
        raise InputError(
            f"{root}: got a pipeline with {parts}, needed a {TRANSFORMER}/ folder",
            hint="only pipelines that denoise with a transformer are supported",
        )
    return folder


def _read_config(folder: Path, root: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{path}: is missing", hint=f"save the model with diffusers' save_pretrained, which writes {CONFIG}"
        )
    _check_inside(path, root)
    config = read_json_object(path)
    name = config.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier():
        got = "nothing" if name is None else repr(name)
        raise InputError(
            f"{path}: _class_name: got {got}, needed the name of a diffusers model class",
            hint='add for example "_class_name": "PixArtTransformer2DModel"',
        )
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):  # Python reads NaN and Infinity, JSON has neither
            raise InputError(f"{path}: {key}: got {value}, needed a finite number", hint="fetch the file again")
    return config


def _weight_files(folder: Path, root: Path) -> list[TensorFile]:
    """The checked safetensors files of a folder: the single file, else the shards of its index."""
    for name in SINGLE_FILES:
        if os.path.lexists(folder / name):
            _check_inside(folder / name, root)
            return [TensorFile(folder / name)]
    for name in INDEX_FILES:
        if os.path.lexists(folder / name):
            _check_inside(folder / name, root)
            return _shards(folder, root, folder / name)
    found = sorted(entry.name for entry in folder.iterdir() if entry.name != CONFIG)
    pickled = [name for name in found if name.endswith(PICKLE_SUFFIXES)]
    if pickled:
        raise InputError(f"{folder / pickled[0]}: got a pickle checkpoint, needed safetensors", hint=CONVERT)
    renamed = [name for name in found if name.endswith(".safetensors")]
    shown = ", ".join(renamed or found[:5]) or "nothing else"
    hint = "copy the weights into the folder"
    if renamed and not any("-of-" in name for name in renamed):  # shards need their index, not a new name
        largest = max(renamed, key=lambda name: (folder / name).lstat().st_size)
        hint = f"rename {largest} to {SINGLE_FILES[0]}"
    raise InputError(f"{folder}: got {shown}, needed {SINGLE_FILES[0]} or {INDEX_FILES[0]}", hint=hint)


def _shards(folder: Path, root: Path, index: Path) -> list[TensorFile]:
    """The shards that an index names, each holding exactly the tensors that the index promises."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index}: weight_map: got {type(weight_map).__name__}, needed an object that is not empty",
            hint="fetch it again",
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_relative(shard) or "/" in shard:
            raise InputError(
                f"{index}: {name}: got the file {shard!r}, needed a file name in the same folder",
                hint="do not use this checkpoint unless you trust its source",
            )
    files = []
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if not os.path.lexists(path):
            raise InputError(f"{path}: is missing, {index.name} names it", hint="fetch every shard")
        _check_inside(path, root)
        files.append(TensorFile(path))
    _check_index(index, weight_map, files)
    return files


def _check_index(index: Path, weight_map: Mapping[str, str], files: Sequence[TensorFile]) -> None:
    for file in files:
        promised = {name for name, shard in weight_map.items() if shard == file.path.name}
        for name in sorted(promised ^ file.entries.keys()):
            held = "does not hold it" if name in promised else "holds it too"
            raise InputError(
                f"{index}: {name}: the index names {weight_map.get(name, 'no file')}, but {file.path.name} {held}",
                hint="fetch the index and all shards of one version",
            )


def _homes(files: Sequence[TensorFile]) -> dict[str, TensorFile]:
    return {name: file for file in files for name in file.entries}


def _check_inside(path: Path, root: Path) -> None:
    """Raise InputError when a path leads out of `root` through a link, unless into its own Hugging Face cache."""
    target = path.resolve()
    allowed = [root]
    snapshots = next((parent for parent in (root, *root.parents) if parent.name == "snapshots"), None)
    if snapshots is not None:
        # The cache keeps files as models--owner--name/snapshots/<revision>/x -> ../../blobs/<hash>.
        allowed.append(snapshots.parent / "blobs")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise InputError(
            f"{path}: got a link to {target}, needed a file inside {root}",
            hint="replace the link by the file if you trust where it leads",
        )
    if not target.is_file():
        raise InputError(
            f"{path}: got {'a folder' if target.is_dir() else 'a broken link'}, needed a file", hint="fetch it again"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
