"""The comparison page: one offline page that shows everything a report of `compare` holds, best methods first.

Text is data: it reaches the page through `tag`, which escapes it. What could not be measured is an en dash. Equal
reports give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from graphs.names import FLOATING_POINT
from lrq_export.comparison import plots
from lrq_export.comparison.ranking import (
    Report,
    Row,
    Setting,
    decibels,
    finite,
    name_of,
    rows_at,
    settings,
    verdict,
)
from lrq_export.package import write_bytes_atomic, write_json_atomic
from lrq_export.verify.markup import (
    DASH,
    Digits,
    Html,
    count,
    digits,
    flat,
    folded,
    join,
    pairs,
    scientific,
    table,
    tag,
)
from lrq_export.verify.page_frame import Part, render_page

STYLE = """
tr:has(.ours) td { background: var(--panel); }
.ours { color: var(--accent); }
.seeds { color: var(--soft); font-size: .8em; white-space: nowrap; }
.method { white-space: nowrap; }
.pair > div { max-width: 40rem; }
"""
HEADS = (
    "#", "Method", "PSNR dB", "by seed", "ε-NMSE", "Fréchet", "Accuracy", "Bits a weight", "Seconds", "Deployable",
    "Note",
)  # fmt: skip
TERMS = (
    ("PSNR dB", "of images drawn from the same seeds as the floating-point model's, mean of all seeds"),
    ("ε-NMSE", "error of the noise predicted in one call, on inputs that calibration did not see"),
    ("Fréchet", "distance of the judge's features to those of the floating-point model's images"),
    ("Accuracy", "images in which the judge sees what they were conditioned on"),
    ("Bits a weight", "with scales, level tables and whatever else the weights or the transform store"),
    ("Seconds", "to quantize, without calibration"),
)
INPUT_HEADS = ("Input of", "Layers", "Width", "J", "Kurtosis", "Peak", "Peak/RMS")
INPUT_TERMS = (
    ("J", "RMS of the input; LRQ-DiT tells layers apart by it"),
    ("Kurtosis", "of the input; 3 is Gaussian, more means outliers"),
    ("Peak", "largest magnitude"),
)


def write_comparison_page(path: Path, report: Report) -> Path:
    """Write the page of `report` to `path` and the report as JSON beside it, each whole or not at all; returns JSON's.

    Raises MissingError on a full disk. `path` ends in another suffix than .json.
    """
    data = Path(path).with_suffix(".json")
    write_json_atomic(data, finite(report))
    write_bytes_atomic(Path(path), render_comparison_page(report).encode("utf-8"))
    return data


def render_comparison_page(report: Report) -> str:
    """The page as text."""
    parts = [_setting(report, setting) for setting in settings(report)]
    parts += [_sizes(report), _inputs(report), _transforms(report), _origin(report)]
    if report["warnings"]:
        parts.insert(0, _warnings(report))
    return render_page(f"lrq-export comparison: {report['source']['class_name']}", _header(report), parts, STYLE)


def _header(report: Report) -> Html:
    source, machine, seeds = (report[key] for key in ("source", "machine", "seeds"))
    methods = len({row["method"] for row in report["rows"]})
    calibration, sampling = (report["recipe"].get(name) or {} for name in ("calibration", "sampling"))
    facts = [
        ("source", tag("code", source["name"])),
        ("judged on", f"{count(report['images'], 'image')} of seeds {', '.join(map(str, seeds))}"),
        ("drawn in", f"{count(sampling['steps'], 'step')} of {sampling['scheduler']}" if sampling else DASH),
        ("calibrated on", count(calibration["samples"], "input") if calibration else DASH),
        ("on", f"{machine['processor']}, {count(machine['cores'], 'core')}"),
    ]
    heading = tag("h1", source["class_name"], tag("small", f" {count(methods, 'method')} compared"))
    terms = folded("What the columns mean", pairs(TERMS))
    verdicts = [tag("div", verdict(rows_at(report, setting))) for setting in settings(report)]
    return tag("header", heading, tag("div", *verdicts, class_="verdict"), pairs(facts), terms)


# -------------------------------------------------------------------------------------------------------- settings


def _setting(report: Report, setting: Setting) -> Part:
    rows, name = rows_at(report, setting), name_of(setting)
    shown = [_row(number, row) for number, row in enumerate(rows, 1)]
    pictures = [plots.psnr_bars(f"psnr {name}", rows), plots.noise_bars(f"noise {name}", rows)]
    content = [
        tag("div", table(HEADS, [*shown, _reference(report)], "compact"), class_="scroll"),
        tag("div", *(tag("div", picture) for picture in pictures), class_="pair"),
    ]
    bits, act_bits = setting
    inputs = "inputs in floating point" if act_bits == FLOATING_POINT else f"inputs of {act_bits} bits"
    line = f"Weights of {bits} bits, {inputs}; highest PSNR first, ours in colour. Good: high PSNR, low ε-NMSE."
    return Part(name.lower(), name, line, join(content, "\n"))


def _row(number: int, row: Row) -> list[object]:
    by_seed = " ".join(map(decibels, row["psnr_db_by_seed"]))
    return [
        digits(number),
        tag("b", row["title"], class_="method" if row["published"] else "method ours"),
        Digits(decibels(row["psnr_db"])),
        tag("span", by_seed, class_="n seeds"),
        scientific(row["noise_nmse"]),
        digits(row["frechet"], ",.3f"),
        digits(row["accuracy"], ".1%"),
        digits(row["bits_per_weight"], ".2f"),
        digits(row["seconds"], ",.1f"),
        tag("span", "✓ yes", class_="mark pass") if row["obstacle"] is None else f"no: {row['obstacle']}",
        tag("span", row["note"], class_="note"),
    ]


def _reference(report: Report) -> list[object]:
    """The floating-point model in a table's last row: what it is compared with has only its accuracy."""
    accuracy, none = digits(report["reference"]["accuracy"], ".1%"), digits(None)
    return ["", tag("span", "floating point", class_="method"), none, "", none, none, accuracy, none, none, "", ""]


# ------------------------------------------------------------------------------------------------------ everything


def _sizes(report: Report) -> Part:
    found = []
    for act_bits in dict.fromkeys(act_bits for _, act_bits in settings(report)):
        picture = plots.psnr_against_size(f"sizes A{act_bits}", report, act_bits)
        if picture is not None:
            found.append(tag("div", tag("h3", f"Inputs of {act_bits} bits"), picture))
    content = tag("div", *found, class_="pair") if found else tag("p", "No PSNR is finite.", class_="empty")
    return Part("sizes", "PSNR against size", "What each bit of a weight buys. Good: up and to the left.", content)


def _inputs(report: Report) -> Part:
    rows = [_input(each) for each in report["inputs"]]
    summary = f"{count(len(rows), 'input')} that quantized layers read"
    listed = folded(summary, tag("div", table(INPUT_HEADS, rows, "compact"), class_="scroll"), pairs(INPUT_TERMS))
    line = "What calibration saw, in the basis of the model. Kurtosis and peak tell outliers; J tells size alone."
    return Part("inputs", "Inputs", line, listed)


def _input(each: Mapping[str, object]) -> list[object]:
    figures = [digits(each[key], "#.3g") for key in ("rms", "kurtosis", "peak", "peak_to_rms")]
    return [tag("code", each["layers"][0]), digits(len(each["layers"])), digits(each["width"], ""), *figures]


def _transforms(report: Report) -> Part:
    """For each setting, the methods that choose by input with their reasons, and in a line those that do not."""
    content = [_chosen(name_of(setting), rows_at(report, setting)) for setting in settings(report)]
    line = "What each method does to the inputs before it quantizes; those that choose tell why."
    return Part("transforms", "Transforms", line, join(content, "\n"))


def _chosen(name: str, rows: Sequence[Row]) -> Html:
    choosing: dict[tuple[tuple[str, str], ...], list[str]] = {}  # reasons by input: the titles of those that share them
    alike = []
    for row in rows:
        reasons = row["transforms"]
        if len(set(reasons.values())) > 1:
            choosing.setdefault(tuple(reasons.items()), []).append(row["title"])
        else:
            alike.append((row["title"], next(iter(reasons.values()), DASH)))
    parts = [tag("h3", name), pairs(alike)]
    for reasons, titles in choosing.items():
        listed = table(
            ("Input of", "Transform, and why"), [(tag("code", layer), why) for layer, why in reasons], "compact"
        )
        parts.append(folded(", ".join(titles), tag("div", listed, class_="scroll")))
    return join(parts)


def _warnings(report: Report) -> Part:
    found = tag("ul", *(tag("li", warning) for warning in report["warnings"]), class_="warnings")
    return Part("warnings", "Warnings", "What speaks against these figures. Good: none.", found)


def _origin(report: Report) -> Part:
    recipe = {key: report["recipe"].get(key) for key in ("keep", "calibration", "sampling")}
    trees = {"Recipe": recipe, "Machine": report["machine"]}
    content = join(folded(title, pairs(flat(tree))) for title, tree in trees.items())
    line = "What it takes to compare again, beside the seeds; bits, transforms and rounding are each method's own."
    return Part("origin", "Recipe and machine", line, content)
