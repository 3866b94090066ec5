"""How the report page writes text, numbers and tables: as HTML, every string escaped that is not `Html` already.

A value of None is an en dash. Equal values give equal text.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DASH = "–"
PSNR_METRIC = "PSNR dB"


class Html(str):
    """Text that is HTML already; every other string is escaped where it is placed."""


def _html(value: Any) -> str:
    """Any value as HTML text."""
    if value is None:
        return DASH
    if isinstance(value, Html):
        return value
    if isinstance(value, list | tuple):
        return "".join(map(_html, value))
    return html.escape(str(value))


def join(parts: Iterable[Any], separator: str = "") -> Html:
    return Html(separator.join(map(_html, parts)))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """<name attributes>children</name>; children and attribute values are escaped; `class_` stands for class."""
    given = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{given}>{join(children)}</{name}>")


class Digits(str):
    """The text of a number: escaped like any other, set in digits of equal width, aligned right in a table."""


def digits(value: float | None, spec: str = ",", unit: str = "") -> Digits:
    if value is None:
        return Digits(DASH)
    if isinstance(value, float) and not math.isfinite(value):
        return Digits("NaN" if math.isnan(value) else "∞" if value > 0 else "-∞")
    return Digits(f"{value:{spec}}{unit}")


def scientific(value: float | None, places: int = 1) -> Digits:
    """3.2e-4; a plain 0 for zero."""
    text = digits(value, f".{places}e" if value else ".0f")
    return Digits(re.sub(r"e([+-])0*(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", text))


def byte_size(value: int | None) -> Digits:
    """Decimal units with three digits: 1.22 GB."""
    if value is None:
        return Digits(DASH)
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= 0.9995 * size:
            return Digits(f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}")
    return Digits(f"{value} B")


def quotient(part: float | None, whole: float | None) -> Digits:
    return digits(part / whole if part is not None and whole else None, ".3f")


def measure(metric: str | None, value: float | None) -> Digits:
    return digits(value, ".2f", " dB") if metric == PSNR_METRIC else scientific(value)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(heads: Sequence[Any], rows: Sequence[Sequence[Any]], class_: str = "") -> Html:
    """A table whose columns align by what the first row holds: figures right, text left."""
    sides = ["n" if isinstance(cell, Digits) else "" for cell in rows[0]] if rows else [""] * len(heads)
    head = [tag("th", title, class_=side, scope="col") for title, side in zip(heads, sides, strict=True)]
    body = [tag("tr", *map(_cell, row)) for row in rows]
    return tag("table", tag("thead", tag("tr", *head)), "\n", tag("tbody", join(body, "\n")), class_=class_)


def _cell(value: Any) -> Html:
    return tag("td", value, class_="n" if isinstance(value, Digits) else "")


def pairs(rows: Iterable[tuple[str, Any]]) -> Html:
    """A two-column list of names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows))


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys as dotted names, in their own order."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else value))
    return rows


def folded(summary: Any, *content: Any) -> Html:
    return tag("details", tag("summary", summary), *content)
