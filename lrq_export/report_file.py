"""report.json of a finished package, read again: by `build` that finds it up to date, by what adds to or repeats it."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrq_export.errors import InputError
from lrq_export.package import REPORT
from lrq_export.untrusted_json import read_json_object


class _Source(BaseModel):
    parameters: int = Field(ge=1)


class _Rung(BaseModel):
    rung: str
    title: str
    blames: str
    metric: str
    value: float | None
    bound: float | None
    passed: bool | None


class _Sizes(BaseModel):
    packed_ratio: float


class _Report(BaseModel):
    """What is read of a report; it holds more."""

    model_config = ConfigDict(strict=True)

    source: _Source
    ladder: list[_Rung]
    sizes: _Sizes
    warnings: list[str]
    tool: dict[str, Any]
    timings: list[dict[str, Any]]


def read_report(package: Path) -> dict[str, Any]:
    """The report of an admitted package, whole. Raises InputError for a file that is no report."""
    path = package / REPORT
    report = read_json_object(path)
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}: not the report of a build: {where}: {first['msg']}", hint="build the package again"
        ) from error
    return report
