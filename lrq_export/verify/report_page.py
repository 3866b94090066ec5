"""report.html: one offline page that shows everything report.json holds, without scripts or anything from elsewhere.

Text from the report is data: it reaches the page through `tag`, which escapes whatever is not `Html` already. What a
report leaves out is said to be missing, and a value of None is an en dash. Equal inputs give equal bytes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrq_export.package import write_bytes_atomic
from lrq_export.verify.graph_picture import STYLE, Graphs
from lrq_export.verify.markup import DASH, Html, count, digits, measure, pairs, tag
from lrq_export.verify.page_frame import Part, render_page, render_part
from lrq_export.verify.report_sections import (
    MARKS,
    RUNGS,
    SECTIONS,
    Exhibits,
    Report,
    Samples,
    Section,
    mark,
    state_of,
)


def write_report_page(path: Path, report: Report, samples: Samples | None, graphs: Graphs | None = None) -> None:
    """Write the page of `report` (the content of report.json) to `path`, whole or not at all.

    `samples` holds "float" and "quantized", each (n, c, h, w) in [-1, 1], drawn from the same seeds; `graphs` are the
    graph after the trace and the one after the last pass.
    """
    write_bytes_atomic(Path(path), render_report_page(report, samples, graphs).encode("utf-8"))


def render_report_page(report: Report, samples: Samples | None, graphs: Graphs | None = None) -> str:
    """The page as text."""
    name = _get(report, "source", "class_name") or "model"
    parts = [_part(section, report, Exhibits(samples, graphs)) for section in SECTIONS]
    return render_page(f"lrq-export report: {name}", _header(report), parts, STYLE)


def render_section(anchor: str, report: Report) -> str:
    """The text of one section as it stands in the page, of those that show nothing but the report."""
    (section,) = (section for section in SECTIONS if section.anchor == anchor)
    return str(render_part(_part(section, report, Exhibits())))


def _part(section: Section, report: Report, shown: Exhibits) -> Part:
    body = section.body(report, shown)
    content = tag("p", section.empty, class_="empty") if body is None else body
    return Part(section.anchor, section.title, section.line, content)


def _get(mapping: Mapping[str, Any] | None, *keys: str) -> Any:
    """The value at a path of keys, None where any of them is missing."""
    for key in keys:
        mapping = (mapping or {}).get(key)
    return mapping


# ---------------------------------------------------------------------------------------------------------- header


def _header(report: Report) -> Html:
    source, tool, machine = (report.get(key) for key in ("source", "tool", "machine"))
    processor, cores = _get(machine, "processor") or "an unnamed processor", _get(machine, "cores")
    state, verdict = _verdict(report)
    facts = [
        ("source", tag("code", _get(source, "path_name"))),
        ("parameters", digits(_get(source, "parameters"))),
        ("made by", f"{_get(tool, 'name') or 'lrq-export'} {_get(tool, 'version') or DASH}"),
        ("on", f"{processor}, {count(cores, 'core')}" if cores else processor),
    ]
    heading = tag("h1", _get(source, "class_name") or "Unnamed model", tag("small", _scheme(report)))
    return tag("header", heading, tag("p", mark(state), " ", verdict, class_=f"verdict {state}"), pairs(facts))


def _scheme(report: Report) -> str:
    bits = Counter((layer.get("bits"), layer.get("act_bits")) for layer in report.get("layers") or [])
    named = [f"W{weight or '?'}A{act or '?'}" for (weight, act), _ in bits.most_common()]
    return f" {' + '.join(named)}" if named else ""


def _verdict(report: Report) -> tuple[str, str]:
    """(pass, fail or open; one sentence): the first rung that broke, or what holds."""
    rungs = report.get("ladder") or []
    failed = [rung for rung in rungs if state_of(rung) == "fail"]
    if failed:
        return "fail", _failure(failed)
    states = dict.fromkeys(RUNGS, "absent") | {str(rung.get("rung")): state_of(rung) for rung in rungs}
    named = {state: [name for name, found in states.items() if found == state] for state in MARKS}
    passed, unbound, absent = named["pass"], named["open"], named["absent"]
    rest = [f"{', '.join(unbound)} reported without a bound"] if unbound else []
    rest += [f"{', '.join(absent)} not run"] if absent else []
    if not passed:
        return "open", "; ".join(["Nothing was checked against a bound", *rest]) + "."
    first = f"{count(len(passed), 'checked rung')} passed" if rest else "All rungs passed"
    return "pass", "; ".join([first, *_gains(report), *rest]) + "."


def _failure(failed: Sequence[Mapping[str, Any]]) -> str:
    """What broke first: everything above it on the ladder may fail for that reason alone."""
    first = failed[0]
    metric, value = first.get("metric"), first.get("value")
    got = measure(metric, value) if value is not None else first.get("note")  # which says why: NaN, infinite
    more = f"; {count(len(failed) - 1, 'later rung')} failed too" if len(failed) > 1 else ""
    name = f"{first.get('rung')} ({first.get('title')})"
    bound = measure(metric, first.get("bound"))
    return f"{name} failed: {metric} {got}, bound {bound}; look at {first.get('blames')}{more}."


def _gains(report: Report) -> list[str]:
    ratio, decibels = _get(report, "sizes", "packed_ratio"), _get(report, "images", "psnr_total_db")
    size = [f"the quantized weights take {digits(ratio, '.3f')} of their fp16 size"] if ratio is not None else []
    images = len(_get(report, "images", "psnr_db") or [])
    near = f"{count(images, 'image')} drawn from the same seeds agree at {digits(decibels, '.2f', ' dB')} PSNR"
    return size + ([near] if decibels is not None else [])
