"""The report of a comparison while it grows: what is measured stays measured, under the same conditions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrq_export.comparison.ranking import finite
from lrq_export.package import write_json_atomic

Setting = tuple[str, int, int]  # method, bits of weights, bits of activations


def setting_of_row(row: dict[str, Any]) -> Setting:
    return row["method"], row["bits"], row["act_bits"]


def read_kept(path: Path | None, conditions: str) -> dict[str, Any] | None:
    """The report at `path` if it was measured under `conditions`, a digest of all but methods and bits; else None."""
    if path is None or not path.is_file():
        return None
    try:
        report = json.loads(path.read_bytes())
    except ValueError:  # whatever it is, it is no report of ours
        return None
    return report if isinstance(report, dict) and report.get("conditions") == conditions else None


def write_kept(path: Path | None, report: dict[str, Any]) -> None:
    """Write the report whole or not at all. Raises MissingError on a full disk."""
    if path is not None:
        write_json_atomic(path, finite(report))
