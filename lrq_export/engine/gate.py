"""A gate before something that several threads use and one of them closes."""

import threading

from lrq_export.errors import UsageError


class Gate:
    """Open until it is closed; a `with` block passes it, and closing waits for everyone inside, once and for all.

    Entering raises UsageError if it is closed already.
    """

    def __init__(self, name: str):
        self._name, self._inside, self._closed = name, 0, False
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            if self._closed:
                raise UsageError(f"{self._name} is closed", hint="load the package again")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            if self._closed:  # someone may wait
                self._changed.notify_all()

    def close(self) -> bool:
        """Let nobody in any more and wait until all have left; True the first time."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: self._inside == 0)
        return first
