"""The workspace of a build: OUT.partial, locked, resumable, swapped in for OUT when it is whole.

A build killed between the two renames of `commit` leaves OUT.previous whole, and the next build puts it back.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Self

from lrq_export.errors import UsageError
from lrq_export.package import (
    DISK_ERRORS,
    MANIFEST,
    TEMPORARY,
    beside,
    disk_full,
    is_package,
    sync_folder,
    write_json_atomic,
)

LAYERS = "layers"  # beside the unfinished package: results of single layers, gone when it is whole


class Workspace:
    """OUT.partial while a package is built in it; made by `open_workspace`, used in a with block.

    `.path` is the folder to build in, `.layers` one for work that the package will not hold (the caller creates it).
    Both hold what an earlier build of the same fingerprint left. Leaving the block without `commit` releases the lock
    and keeps the work for the next run; `commit` removes it.
    """

    def __init__(self, out: Path, fingerprint: str):
        self.out, self.fingerprint = out, fingerprint
        self.partial, self.previous = beside(out, ".partial"), beside(out, ".previous")
        self.path, self.layers = self.partial / "package", self.partial / LAYERS
        self._state, self._lock_path = self.partial / "state.json", self.partial / "lock"
        self._lock: int | None = None

    def commit(self) -> None:
        """Swap the finished package in for OUT and remove everything else. Its manifest must be written.

        Raises UsageError when OUT was filled with something else meanwhile.
        """
        assert (self.path / MANIFEST).is_file(), "commit before write_manifest"
        refuse_foreign(self.out)
        _remove_unfinished(self.path)
        _sync_tree(self.path)
        if self.out.exists():
            os.rename(self.out, self.previous)
        os.rename(self.path, self.out)
        sync_folder(self.out.parent)
        self._discard_previous()
        _remove_folder(self.layers)
        self.close()

    def close(self) -> None:
        """Release the lock; keep unfinished work, leave nothing behind when there is none."""
        if self._lock is None:
            return
        if not self.path.exists():
            self._state.unlink(missing_ok=True)
        # Removed while still held, so that whoever opens the old file next sees that it is no longer in place.
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None
        with contextlib.suppress(OSError):  # it holds work, or another build has opened it already
            self.partial.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        """Take the lock, undo a half-done swap, then keep or wipe what an earlier build left."""
        self._acquire()
        _remove_unfinished(self.partial)
        if self.previous.exists() and not self.out.exists():
            os.rename(self.previous, self.out)
            sync_folder(self.out.parent)
        elif self.previous.exists():
            self._discard_previous()
        if _read_fingerprint(self._state) == self.fingerprint and self.path.is_dir():
            return
        # The state goes first: without it, what is left of the work is never taken for whole.
        self._state.unlink(missing_ok=True)
        _remove_folder(self.path)
        _remove_folder(self.layers)
        self.path.mkdir()
        write_json_atomic(self._state, {"fingerprint": self.fingerprint})

    def _acquire(self) -> None:
        while self._lock is None:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                in_place = os.path.exists(self._lock_path) and os.path.samestat(
                    os.fstat(lock), os.stat(self._lock_path)
                )
            except BlockingIOError as error:
                os.close(lock)
                raise UsageError(
                    f"{self.out}: another build is writing it", hint="wait for it to end, or build to another folder"
                ) from error
            if in_place:
                self._lock = lock
            else:
                os.close(lock)  # its owner removed it between our open and our lock

    def _discard_previous(self) -> None:
        """Remove OUT.previous. It is moved first, so that a kill never leaves half a package under that name."""
        discarded = self.partial / "discarded"
        _remove_folder(discarded)
        if self.previous.exists():
            os.rename(self.previous, discarded)
            _remove_folder(discarded)


def open_workspace(out: Path, fingerprint: str) -> Workspace:
    """Lock OUT and open OUT.partial: resumed when it was left by the same fingerprint, else started empty.

    Raises UsageError when OUT, OUT.partial or OUT.previous holds something that lrq-export did not write, or when
    another build holds the lock; MissingError when the disk is full.
    """
    out = Path(out).resolve()
    if out.parent == out or os.path.ismount(out):
        raise UsageError(
            f"{out}: got a mount point, needed a folder that can be renamed", hint=f"build to {out / 'package'}"
        )
    workspace = Workspace(out, fingerprint)
    refuse_foreign(out)
    refuse_foreign(workspace.previous)
    _refuse_foreign_partial(workspace.partial)
    try:
        workspace._open()
    except OSError as error:
        workspace.close()
        if error.errno in DISK_ERRORS:
            raise disk_full(out, 0, error) from error
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)) or error.errno == errno.EROFS:
            raise UsageError(
                f"{error.filename}: cannot write: {error.strerror}", hint="choose another output folder"
            ) from error
        raise
    except BaseException:
        workspace.close()
        raise
    return workspace


def refuse_foreign(folder: Path) -> None:
    """Raise UsageError unless the path is free, an empty folder, or a package that may be replaced."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder}: got a file, needed a folder or a free name", hint="choose another output folder")
    if any(folder.iterdir()) and not is_package(folder):
        raise UsageError(
            f"{folder}: holds {_first_name(folder)} but no {MANIFEST} of ours, needed an empty folder or a package",
            hint="choose another output folder, or empty this one yourself",
        )


def _refuse_foreign_partial(partial: Path) -> None:
    """Raise UsageError unless OUT.partial holds only what Workspace puts there: its content will be wiped."""
    if not os.path.lexists(partial):
        return
    ours = {"package", LAYERS, "state.json", "lock", "discarded"}
    if partial.is_symlink() or not partial.is_dir():
        problem = "got a file or a link"
    else:
        names = {entry.name for entry in partial.iterdir() if not entry.name.endswith(TEMPORARY)} - ours
        problem = f"holds {min(names)}" if names else None
    if problem:
        raise UsageError(
            f"{partial}: {problem}, needed a name that the build may use",
            hint="move it away, or choose another output folder",
        )


def _first_name(folder: Path) -> str:
    return min(entry.name for entry in folder.iterdir())


def _read_fingerprint(path: Path) -> str | None:
    """The fingerprint of an earlier build, or None when there is none that can be trusted."""
    try:
        return json.loads(path.read_bytes())["fingerprint"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def _remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of a build that was killed."""
    for root, _, files in os.walk(folder):
        for name in files:
            if name.endswith(TEMPORARY):
                os.unlink(os.path.join(root, name))


def _remove_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder: engines are written by other tools, which do not."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))
