"""Named arrays in a temporary folder: what a large model's layers read, while only one of them is looked at."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np


class ArrayFolder(Mapping[str, np.ndarray]):
    """A mapping from names to arrays that lie on disk; the folder goes when the mapping does."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="lrq-export-")
        self._paths: dict[str, Path] = {}

    @property
    def path(self) -> Path:
        return Path(self._folder.name)

    def __setitem__(self, name: str, array: np.ndarray) -> None:
        path = self._paths.setdefault(name, self.path / f"{len(self._paths)}.npy")
        np.save(path, array)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.load(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
