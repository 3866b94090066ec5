"""Named arrays in a temporary folder: what a large model's layers read, while only one of them is looked at."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrq_export.package import DISK_ERRORS, disk_full


@dataclass(frozen=True)
class Stored:
    """Where an array lies, and what its bytes mean."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]


class ArrayFolder(Mapping[str, np.ndarray]):
    """A mapping from names to arrays that lie on disk; the folder goes when the mapping does."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="lrq-export-")
        self._stored: dict[str, Stored] = {}

    @property
    def path(self) -> Path:
        return Path(self._folder.name)

    def __setitem__(self, name: str, array: np.ndarray) -> None:
        """Raises MissingError when the disk is full."""
        path = self._stored[name].path if name in self._stored else self.path / str(len(self._stored))
        try:
            path.write_bytes(np.ascontiguousarray(array))
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise disk_full(path, array.nbytes, error) from error
            raise
        self._stored[name] = Stored(path, array.dtype, array.shape)

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self._stored[name]
        return np.fromfile(stored.path, stored.dtype).reshape(stored.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
