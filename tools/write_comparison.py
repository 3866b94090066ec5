"""Write what `lrq-export compare` found into the documentation: tables in Markdown, and a sentence on who wins.

    python tools/write_comparison.py REPORT.json ... [--into docs/methods.md]

REPORT.json lies beside the page that `lrq-export compare SOURCE -o REPORT.html` wrote. What stood between the two
markers of the documentation is replaced.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from lrq_export.comparison.ranking import (
    Report,
    Row,
    decibels,
    name_of,
    not_measured,
    rows_at,
    setting_of,
    settings,
    verdict,
)
from lrq_export.comparison.run import SCHEMA
from lrq_export.errors import InputError, LrqError
from lrq_export.package import write_bytes_atomic
from lrq_export.verify.markup import DASH, count, digits, scientific

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"
FIGURES = {
    "ε-NMSE": lambda row: scientific(row["noise_nmse"]),
    "Fréchet": lambda row: digits(row["frechet"], ",.3f"),
    "accuracy": lambda row: digits(row["accuracy"], ".1%"),
    "bits a weight": lambda row: digits(row["bits_per_weight"], ".2f"),
    "seconds": lambda row: digits(row["seconds"], ",.1f"),
}


def read_report(path: Path) -> Report:
    """Raises InputError for what is no report of a comparison."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read the report: {error}", hint="run lrq-export compare again") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or not report.get("rows"):
        raise InputError(
            f"{path}: is no report of a comparison of schema {SCHEMA}", hint="pass what lrq-export compare wrote"
        )
    return report


def section(report: Report) -> str:
    """All that the documentation says of one report."""
    names, methods = [name_of(setting) for setting in settings(report)], best_first(report)
    winners = [rows_at(report, setting)[0] for setting in settings(report)]
    psnr, rest = [], []
    for method in methods:
        rows = [one_row(report, method, setting) for setting in settings(report)]
        title = next(row["title"] for row in rows if row is not None)
        psnr.append([title, *(psnr_cell(row, row in winners) for row in rows)])
        rest.append([title, *(" / ".join(figure(row) if row else DASH for row in rows) for figure in FIGURES.values())])
    return "\n\n".join(
        [
            f"### {report['source']['class_name']}, `{report['source']['name']}`",
            facts(report),
            table(["mean PSNR in dB", *names], psnr),
            "\n".join(f"- {verdict(rows_at(report, setting))}" for setting in settings(report)),
            f"The other figures, at {' / '.join(names)}:",
            table(["method", *FIGURES], rest),
        ]
    )


def facts(report: Report) -> str:
    """What the figures were measured on."""
    sampling, machine, accuracy = report["recipe"]["sampling"], report["machine"], report["reference"]["accuracy"]
    seeds = ", ".join(map(str, report["seeds"]))
    drawn = f"{count(report['images'], 'image')} of seeds {seeds}, {count(sampling['steps'], 'step')} of"
    judged = "" if accuracy is None else f" The floating-point model's own accuracy is {accuracy:.1%}."
    timed = f" Seconds on {machine['processor']}, {count(machine['cores'], 'core')}."
    return f"{drawn} {sampling['scheduler']}.{judged}{timed}"


def best_first(report: Report) -> list[str]:
    """Methods by their PSNR, averaged over the settings."""
    by_method: dict[str, list[float]] = {}
    for row in report["rows"]:
        value = -math.inf if not_measured(row["psnr_db"]) else row["psnr_db"]
        by_method.setdefault(row["method"], []).append(value)
    return sorted(by_method, key=lambda method: sum(by_method[method]) / len(by_method[method]), reverse=True)


def one_row(report: Report, method: str, setting: tuple[int, int]) -> Row | None:
    return next((row for row in report["rows"] if row["method"] == method and setting_of(row) == setting), None)


def psnr_cell(row: Row | None, won: bool) -> str:
    text = DASH if row is None else decibels(row["psnr_db"])
    return f"**{text}**" if won and text != DASH else text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def rewritten(page: str, sections: Sequence[str], name: str) -> str:
    """`page` with `sections` between its markers. Raises InputError for a page without both."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{name}: needed a line {BEGIN} and one {END} below it", hint="write both where tables belong")
    return "\n\n".join([before + begin, *sections, end + after])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "methods.md")
    args = parser.parse_args()
    try:
        if not args.into.is_file():
            raise InputError(f"{args.into}: no such file", hint="name a page that has the two markers")
        sections = [section(read_report(path)) for path in args.reports]
        page = rewritten(args.into.read_text(encoding="utf-8"), sections, str(args.into))
        write_bytes_atomic(args.into, page.encode("utf-8"))
    except LrqError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
