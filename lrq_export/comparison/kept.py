"""The report of a comparison while it grows: what is measured stays measured, under the same conditions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrq_export.comparison.ranking import finite
from lrq_export.errors import UsageError
from lrq_export.package import write_json_atomic


def read_kept(path: Path | None, conditions: str) -> dict[str, Any] | None:
    """The report at `path`, if there is one, of `conditions`: a digest of all but methods and bits.

    Raises UsageError for anything else at `path`: it would be lost.
    """
    if path is None or not path.exists():
        return None
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):
        report = None
    if not _is_report(report):
        raise UsageError(f"{path}: is no report of a comparison, and would be overwritten", hint="choose another name")
    if report["conditions"] != conditions:
        raise UsageError(
            f"{path}: holds a comparison of another model, or of other inputs, seeds, settings, versions or machine",
            hint="choose another name, or remove it",
        )
    return report


def _is_report(report: Any) -> bool:
    """Whether all is there that more rows can be added to."""
    if not isinstance(report, dict) or not {"conditions", "rows", "reference", "seeds", "source"} <= report.keys():
        return False
    return all(
        isinstance(row, dict) and {"method", "bits", "act_bits", "psnr_db"} <= row.keys() for row in report["rows"]
    )


def write_kept(path: Path | None, report: dict[str, Any]) -> None:
    """Write the report whole or not at all. Raises MissingError on a full disk."""
    if path is not None:
        write_json_atomic(path, finite(report))
