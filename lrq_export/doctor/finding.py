"""One line of `lrq-export doctor`."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from lrq_export.errors import one_line

NAME_WIDTH = 20


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WRONG = "wrong"
    ABSENT = "absent"  # optional, and not here


@dataclass(frozen=True)
class Finding:
    """What a check found: in `text`, and how to mend it in `fix`. `required`: the CPU path does not run without it."""

    name: str
    status: Status
    text: str
    fix: str | None = None
    required: bool = False

    def line(self) -> str:
        mend = "" if self.fix is None else f". Fix: {self.fix}"
        return f"{self.name:<{NAME_WIDTH}} {self.status}: {one_line(self.text)}{mend}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(name: str, text: str, required: bool = False) -> Finding:
    return Finding(name, Status.OK, text, None, required)


def wrong(name: str, text: str, fix: str, required: bool = False) -> Finding:
    return Finding(name, Status.WRONG, text, fix, required)


def absent(name: str, needed_for: str, fix: str) -> Finding:
    return Finding(name, Status.ABSENT, f"needed for {needed_for}", fix)
