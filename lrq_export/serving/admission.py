"""A bounded queue: so many requests run, so many wait, and the next one is told when to come back."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from lrq_export.serving.protocol import RefusedError

LONGEST_WAIT = 60  # seconds that Retry-After ever says
NEWEST = 0.2  # weight of the newest run in the mean that Retry-After is made from


class Admission:
    """Counts the requests inside the server. Used from its event loop alone, so it needs no locks."""

    def __init__(self, workers: int, queue: int):
        self.workers, self.queue = workers, queue
        self.inside = 0  # read, waiting, running, or being answered
        self.running = 0
        self.sending = 0  # answers that are not read to the end
        self._turns = asyncio.Semaphore(workers)  # first come, first served
        self._mean_seconds = 0.0

    @property
    def waiting(self) -> int:
        return self.inside - self.running - self.sending

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place inside. Raises RefusedError (503) when all are taken; nothing of the request was kept by then."""
        if self.inside >= self.workers + self.queue:
            raise RefusedError(
                503, "busy", f"the queue is full: {self.waiting} wait, {self.running} run, {self.sending} are answered",
                {"Retry-After": str(self.seconds_until_free())},
            )  # fmt: skip
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While an answer is sent, in a place inside."""
        self.sending += 1
        try:
            yield
        finally:
            self.sending -= 1

    async def turn(self) -> None:
        """Wait to be the next to run; `done` gives the turn back."""
        await self._turns.acquire()
        self.running += 1

    def done(self, seconds: float | None) -> None:
        """Give a turn back, after a run of so many seconds, or none."""
        self.running -= 1
        self._turns.release()
        if seconds is not None:
            self._mean_seconds += (NEWEST if self._mean_seconds else 1.0) * (seconds - self._mean_seconds)

    def seconds_until_free(self) -> int:
        """When those inside will have been served, as far as the last runs tell."""
        return min(LONGEST_WAIT, max(1, math.ceil(self._mean_seconds * self.inside / self.workers)))
