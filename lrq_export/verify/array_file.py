"""Named arrays in a temporary file: what a large model's layers read, while only one of them is looked at."""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrq_export.package import DISK_ERRORS, disk_full


@dataclass(frozen=True)
class Stored:
    """Where an array lies in the file, and what its bytes mean."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class ArrayFile(Mapping[str, np.ndarray]):
    """A mapping from names to arrays that lie on disk.

    The file has no name, so its space is free again when the mapping is gone, or the process is, however it ended.
    """

    def __init__(self):
        # It lives as long as the mapping, so no with block closes it.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._stored: dict[str, Stored] = {}

    def __setitem__(self, name: str, array: np.ndarray) -> None:
        """Write at the end, even if the name is known. Raises MissingError when the disk is full."""
        offset = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(array.tobytes())
            self._file.flush()
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise disk_full(Path(tempfile.gettempdir()), array.nbytes, error) from error
            raise
        self._stored[name] = Stored(offset, array.dtype, array.shape)

    def __getitem__(self, name: str) -> np.ndarray:
        """A read-only array."""
        stored = self._stored[name]
        self._file.seek(stored.offset)
        data = self._file.read(stored.dtype.itemsize * math.prod(stored.shape))
        return np.frombuffer(data, stored.dtype).reshape(stored.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
