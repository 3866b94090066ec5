"""Who comes first in a report of `compare`, for everything that shows one: page, command line and documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrq_export.verify.markup import DASH

EQUAL = 999.0  # dB that stand for equal images where infinity cannot: JSON has none
Report = Mapping[str, Any]
Row = Mapping[str, Any]
Setting = tuple[int, int]  # bits of weights, bits of activations


def setting_of(row: Row) -> Setting:
    return row["bits"], row["act_bits"]


def name_of(setting: Setting) -> str:
    """W4A8."""
    return "W{}A{}".format(*setting)


def settings(report: Report) -> list[Setting]:
    """In the order in which they were run."""
    return list(dict.fromkeys(map(setting_of, report["rows"])))


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Highest mean PSNR first, what could not be measured last; equal ones in their order."""
    return sorted(rows, key=lambda row: -math.inf if not_measured(row["psnr_db"]) else row["psnr_db"], reverse=True)


def rows_at(report: Report, setting: Setting) -> list[Row]:
    """The rows of one setting, ranked."""
    return ranked(row for row in report["rows"] if setting_of(row) == setting)


def not_measured(value: float | None) -> bool:
    return value is None or math.isnan(value)


def decibels(value: float | None, unit: str = "") -> str:
    """Two decimals; ∞ for equal images, an en dash for what could not be measured."""
    if not_measured(value):
        return DASH
    return ("∞" if value >= EQUAL else f"{value:.2f}") + unit


def verdict(rows: Sequence[Row]) -> str:
    """One sentence on the ranked rows of one setting: who wins, and by how much over the best of the other side.

    The sides are what was published, and ours.
    """
    best = rows[0]
    rival = next((row for row in rows if row["published"] != best["published"]), None)
    at, first = f"At {name_of(setting_of(best))}", best["psnr_db"]
    if not_measured(first):
        return f"{at} no image could be compared."
    won = f"{at} “{best['title']}” wins with {decibels(first, ' dB')}"
    if rival is None:
        return f"{won}; {'nothing of ours' if best['published'] else 'no published method'} was compared."
    side, second = "the best published method" if rival["published"] else "the best of ours", rival["psnr_db"]
    if not_measured(second):
        return f"{won}; {side}, “{rival['title']}”, could not be measured."
    return f"{won}; {side}, “{rival['title']}”, has {decibels(second, ' dB')}, {_gap(first, second)}."


def _gap(best: float, rival: float) -> str:
    if decibels(best) == decibels(rival):
        return "as many"
    return decibels(EQUAL if best >= EQUAL else best - rival, " dB less")


def finite(report: Report) -> dict[str, Any]:
    """The report as JSON can hold it: EQUAL for an infinite PSNR, None for any other number that is not finite."""
    return {key: _finite(value, key) for key, value in report.items()}


def _finite(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {inner: _finite(item, inner) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, key) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return EQUAL if value == math.inf and key.startswith("psnr_db") else None
