"""A gate before something that several threads use and one of them closes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lrq_export.errors import UsageError


class Gate:
    """Open until it is closed; closing waits for everyone inside, once and for all."""

    def __init__(self, name: str):
        self._name, self._inside, self._closed = name, 0, False
        self._changed = threading.Condition()

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Within its block, the gate is not closed. Raises UsageError if it is already."""
        with self._changed:
            if self._closed:
                raise UsageError(f"{self._name} is closed", hint="load the package again")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self) -> bool:
        """Let nobody in any more and wait until all have left; True the first time."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: self._inside == 0)
        return first
