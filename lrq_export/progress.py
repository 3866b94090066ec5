"""How long work shows itself: a bar with an ETA on a terminal, JSON lines for machines, or nothing."""

import json
import sys
import time
from contextlib import contextmanager
from typing import Protocol

from lrq_export.memory import give_back


class Progress(Protocol):
    """What the stages report to."""

    def begin(self, stage: str, total: int) -> None: ...
    def advance(self, what: str = "") -> None: ...
    def end(self, stage: str, seconds: float) -> None: ...


class Silent:
    """Reports nothing: the default of the library calls."""

    def begin(self, stage: str, total: int) -> None: ...
    def advance(self, what: str = "") -> None: ...
    def end(self, stage: str, seconds: float) -> None: ...


class JsonLines:
    """One JSON object a line on standard output."""

    def begin(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, total, 0
        self._write(event="begin", stage=stage, total=total)

    def advance(self, what: str = "") -> None:
        self.done += 1
        self._write(event="advance", stage=self.stage, done=self.done, total=self.total, what=what)

    def end(self, stage: str, seconds: float) -> None:
        self._write(event="end", stage=stage, seconds=round(seconds, 3))

    def _write(self, **event) -> None:
        print(json.dumps(event), flush=True)


class Bar:
    """A rich progress bar per stage, with elapsed time and ETA, on standard error; nothing where it is no terminal."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(file=sys.stderr)
        self.bars = Progress(
            TextColumn("{task.description:<10}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[what]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def begin(self, stage: str, total: int) -> None:
        self.bars.start()
        self.task = self.bars.add_task(stage, total=max(total, 1), what="")

    def advance(self, what: str = "") -> None:
        self.bars.update(self.task, advance=1, what=what)

    def end(self, stage: str, seconds: float) -> None:
        task = self.bars.tasks[self.task]
        self.bars.update(self.task, completed=task.total, what="")

    def stop(self) -> None:
        self.bars.stop()


@contextmanager
def shown(as_json: bool):
    """How work shows itself on the command line; the bar is taken down when it ends."""
    progress = JsonLines() if as_json else Bar()
    try:
        yield progress
    finally:
        if isinstance(progress, Bar):
            progress.stop()


@contextmanager
def stage(progress: Progress, name: str, timings: dict[str, float], total: int = 1):
    """Time one stage into `timings` and show it."""
    progress.begin(name, total)
    started = time.perf_counter()
    yield
    give_back()
    timings[name] = timings.get(name, 0.0) + time.perf_counter() - started
    progress.end(name, timings[name])
