"""report.html: one offline page that shows everything report.json holds, without scripts or anything from elsewhere.

Text from the report is data: it reaches the page through `tag`, which escapes whatever is not `Html` already. What a
report leaves out is said to be missing, and a value of None is an en dash. Equal inputs give equal bytes.
"""

import html
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from lrq_export.package import write_bytes_atomic
from lrq_export.verify import plots
from lrq_export.verify.metrics import psnr
from lrq_export.verify.plots import DASH, Digits, Html, byte_size, count, digits, join, pairs, scientific, table, tag

RUNGS = ("R0", "R1", "R2", "R3", "R4", "R5")
MOST_IMAGES = 24
MOST_WORST = 5
SMALL_SIDE = 64  # images up to this side are magnified less wide than larger ones

Report = Mapping[str, Any]
Samples = Mapping[str, np.ndarray]


class Section(NamedTuple):
    """One part of the page. `body` returns None when the report holds nothing for it; `empty` then says so."""

    anchor: str
    title: str
    line: str  # what it shows and what is good
    body: Callable[[Report, Samples | None], Html | None]
    empty: str = "This report holds nothing for it."


def write_report_page(path: Path, report: Report, samples: Samples | None) -> None:
    """Write the page of `report` (the content of report.json) to `path`, whole or not at all.

    `samples` holds "float" and "quantized", each (n, c, h, w) in [-1, 1], drawn from the same seeds.
    """
    write_bytes_atomic(Path(path), render_report_page(report, samples).encode("utf-8"))


def render_report_page(report: Report, samples: Samples | None) -> str:
    """The page as text."""
    name = _get(report, "source", "class_name") or "model"
    links = join((tag("a", section.title, href=f"#{section.anchor}") for section in SECTIONS), " ")
    sections = [_section(section, report, samples) for section in SECTIONS]
    return plots.PAGE.format(
        title=html.escape(f"lrq-export report: {name}"),
        style=plots.STYLE_SHEET,
        body=join([_header(report), tag("nav", links), *sections], "\n"),
    )


def _section(section: Section, report: Report, samples: Samples | None) -> Html:
    body = section.body(report, samples)
    content = tag("p", section.empty, class_="empty") if body is None else body
    line = tag("p", section.line, class_="line")
    return tag("section", tag("h2", section.title), line, content, id=section.anchor)


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
    return tag("header", heading, tag("p", _mark(state), " ", verdict, class_=f"verdict {state}"), pairs(facts))


def _scheme(report: Report) -> str:
    bits = Counter((layer.get("bits"), layer.get("act_bits")) for layer in report.get("layers") or [])
    named = [f"W{weight or '?'}A{act or '?'}" for (weight, act), _ in bits.most_common()]
    return f" {' + '.join(named)}" if named else ""


def _verdict(report: Report) -> tuple[str, str]:
    """(pass, fail or open; one sentence): the first rung that broke, or what holds."""
    rungs = report.get("ladder") or []
    failed = [rung for rung in rungs if _state(rung) == "fail"]
    if failed:
        return "fail", _failure(failed)
    states = dict.fromkeys(RUNGS, "absent") | {str(rung.get("rung")): _state(rung) for rung in rungs}
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
    got = plots.measure(metric, value) if value is not None else first.get("note")  # which says why: NaN, infinite
    more = f"; {count(len(failed) - 1, 'later rung')} failed too" if len(failed) > 1 else ""
    name = f"{first.get('rung')} ({first.get('title')})"
    bound = plots.measure(metric, first.get("bound"))
    return f"{name} failed: {metric} {got}, bound {bound}; look at {first.get('blames')}{more}."


def _gains(report: Report) -> list[str]:
    ratio, decibels = _get(report, "sizes", "packed_ratio"), _get(report, "images", "psnr_total_db")
    size = [f"the quantized weights take {digits(ratio, '.3f')} of their fp16 size"] if ratio is not None else []
    images = len(_get(report, "images", "psnr_db") or [])
    near = f"{count(images, 'image')} drawn from the same seeds agree at {digits(decibels, '.2f', ' dB')} PSNR"
    return size + ([near] if decibels is not None else [])


# ---------------------------------------------------------------------------------------------------------- ladder

MARKS = {"pass": "✓ pass", "fail": "✗ FAIL", "open": "○ no bound", "absent": "– not run"}


def _mark(state: str) -> Html:
    return tag("span", MARKS[state], class_=f"mark {state}")


def _ladder(report: Report, _: Samples | None) -> Html | None:
    rungs = report.get("ladder") or []
    if not rungs:
        return None
    ticks = [tag("span", f"1e-{decade}" if decade else "1", style=plots.at(-decade)) for decade in (16, 12, 8, 4, 0)]
    heads = ("Result", "Rung", "What is compared", "A failure blames", "Metric", "Value", "Bound")
    named = {rung.get("rung") for rung in rungs}
    every = [*rungs, *({"rung": name} for name in RUNGS if name not in named)]
    rows = [_rung(rung) for rung in sorted(every, key=lambda rung: str(rung.get("rung")))]
    return table([*heads, tag("span", *ticks, class_="ticks")], rows, "ladder")


def _state(rung: Mapping[str, Any]) -> str:
    if rung.get("passed") is None:
        return "absent" if rung.get("value") is None else "open"
    return "pass" if rung["passed"] else "fail"


def _rung(rung: Mapping[str, Any]) -> list[Any]:
    metric, value, bound, note = (rung.get(key) for key in ("metric", "value", "bound", "note"))
    state = _state(rung)
    limit = "" if bound is None else "≥ " if metric == plots.PSNR_METRIC else "≤ "
    title = join([rung.get("title"), tag("div", note, class_="note") if note else Html("")])
    name = tag("b", rung.get("rung"))
    figures = [plots.measure(metric, value), Digits(limit + plots.measure(metric, bound))]
    return [
        _mark(state),
        name,
        title,
        rung.get("blames"),
        tag("span", metric, class_="metric"),
        *figures,
        plots.gauge(metric, value, bound, state),
    ]


def _warnings(report: Report, _: Samples | None) -> Html | None:
    found = report.get("warnings") or []
    return tag("ul", *(tag("li", warning) for warning in found), class_="warnings") if found else None


# --------------------------------------------------------------------------------------------------------- samples


def _samples(report: Report, samples: Samples | None) -> Html | None:
    images = report.get("images") or {}
    if samples is None:
        return _image_table(images)
    float_, quantized = (np.asarray(samples[key], np.float32) for key in ("float", "quantized"))
    shown = min(len(float_), MOST_IMAGES)
    if not shown:
        return None
    measured = images.get("psnr_db") or []
    if len(measured) != len(float_):  # of other images than these
        images = {**images, "psnr_total_db": None}
        measured = [psnr(*pair) for pair in zip(quantized, float_, strict=True)]
    factor = plots.amplification(np.abs(quantized[:shown] - float_[:shown]))
    worst = min(range(shown), key=lambda index: _ranked(measured[index]))
    wide = "grid wide" if max(float_.shape[2:]) > SMALL_SIDE else "grid"
    captions = [_caption(images, index, measured[index], index == worst) for index in range(shown)]
    triples = [plots.image_triple(float_[index], quantized[index], factor, captions[index]) for index in range(shown)]
    legend = tag("p", _summary(images, measured), " ", plots.image_legend(float_, factor, shown))
    return join([legend, tag("div", *triples, class_=wide)])


def _image_table(images: Mapping[str, Any]) -> Html | None:
    measured = images.get("psnr_db") or []
    if not measured:
        return None
    rows = [(_label(images, index), digits(value, ".2f")) for index, value in enumerate(measured)]
    pictures_gone = tag("p", _summary(images, measured), " The pictures themselves were not handed to this page.")
    return join([pictures_gone, table(("Image", "PSNR dB"), rows)])


def _ranked(decibels: float | None) -> float:
    """A PSNR to order by: None is what JSON holds for two equal images."""
    return math.inf if decibels is None else decibels


def _summary(images: Mapping[str, Any], measured: Sequence[float]) -> str:
    total = images.get("psnr_total_db")
    over_all = f"{digits(total, '.2f')} dB over all pixels; " if total is not None else ""
    ranked = [*map(_ranked, measured)]
    low, middle, high = (digits(value, ".2f") for value in (min(ranked), median(ranked), max(ranked)))
    return f"PSNR of {count(len(measured), 'image')}: {over_all}worst {low}, median {middle}, best {high} dB."


def _label(images: Mapping[str, Any], index: int) -> str:
    labels = images.get("labels") or []
    return str(labels[index]) if index < len(labels) else f"image {index + 1}"


def _caption(images: Mapping[str, Any], index: int, decibels: float, worst: bool) -> Html:
    note = [" ", tag("em", "worst")] if worst else []
    value = tag("span", digits(decibels, ".2f", " dB"), class_="n")
    return tag("figcaption", tag("span", _label(images, index)), tag("span", value, *note))


# ---------------------------------------------------------------------------------------------------- error curves


def _errors(report: Report, _: Samples | None) -> Html | None:
    noise, steps = (report.get(key) or [] for key in ("noise_error_by_timestep", "trajectory"))
    found = []
    if noise:
        title = "One call: predicted noise, by timestep (pure noise on the left)"
        found.append(_curve(title, noise, {"timestep": "Timestep"}, falling=True))
    if steps:
        title = "A whole trajectory: latents after each step, same seeds"
        found.append(_curve(title, steps, {"step": "Step", "timestep": "Timestep"}))
    return tag("div", *found, class_="pair") if found else None


def _curve(title: str, points: Sequence[Mapping[str, Any]], keys: Mapping[str, str], falling: bool = False) -> Html:
    axis, label = next(iter(keys.items()))
    drawn = [point for point in points if point.get("nmse") is not None]
    rows = [[*(digits(point.get(key), ",g") for key in keys), scientific(point.get("nmse"))] for point in points]
    worst = max(drawn, key=lambda point: point["nmse"], default={})
    line = f"Largest {scientific(worst.get('nmse'))} at {label.lower()} {digits(worst.get(axis), ',g')}."
    xs, ys = ([point[key] for point in drawn if math.isfinite(point["nmse"])] for key in (axis, "nmse"))
    picture = plots.curve(axis, xs, ys, label.lower(), "NMSE", falling) if xs else ""
    numbers = plots.folded(f"{count(len(rows), 'value')}", table([*keys.values(), "NMSE"], rows))
    return tag("div", tag("h3", title), picture, tag("p", line, class_="note"), numbers)


# ---------------------------------------------------------------------------------------------------------- layers

LAYER_HEADS = (
    "#", "Layer", "Shape", "Bits", "Group", "Block", "Rotated by, and why",
    "Weight NMSE", "Weighted", "Output NMSE", "", "J", "Kurtosis", "Peak/RMS", "Bytes", "of fp16",
)  # fmt: skip
LAYER_TERMS = (
    ("Bits", "weight / activation; activation 16 stays in floating point"),
    ("Group", "columns that share a codebook; row = the whole row"),
    ("Block", "channels per rotation"),
    ("Weight NMSE", "error of the weights alone"),
    ("Weighted", "the same, columns weighted by the input's second moment"),
    ("Output NMSE", "error of the layer's output, bar relative to the worst layer"),
    ("J", "RMS of the input"),
    ("Kurtosis", "of the input; 3 is Gaussian, more means outliers"),
)


def _layers(report: Report, _: Samples | None) -> Html | None:
    layers = report.get("layers") or []
    if not layers:
        return None
    reasons = Counter(layer.get("reason") for layer in layers)
    shared = [reason for reason, uses in reasons.items() if reason and uses > 1]
    errors = [layer.get("output_nmse") for layer in layers]
    measured = [(value, row) for row, value in enumerate(errors) if value is not None and math.isfinite(value)]
    worst = [row for _, row in sorted(measured, reverse=True)[:MOST_WORST]]
    largest = measured and max(measured)[0]
    rows = [_layer(number, layer, shared, largest) for number, layer in enumerate(layers, 1)]
    every = tag("div", table(LAYER_HEADS, rows, "compact"), class_="scroll")
    overview = plots.dots("layers", errors, worst, "layer, in the table's order", "output NMSE") if measured else ""
    legend = _reasons({reason: reasons[reason] for reason in shared})
    return join([_worst(layers, worst), overview, legend, every, pairs(LAYER_TERMS)], "\n")


def _layer(number: int, layer: Mapping[str, Any], shared: Sequence[str], largest: float) -> list[Any]:
    """One row: a reason that several layers share stands as its number in the list above the table."""
    reason, group = layer.get("reason"), layer.get("group_size")
    why = f"[{shared.index(reason) + 1}]" if reason in shared else reason
    output, size = layer.get("output_nmse"), layer.get("bytes")
    return [
        digits(number),
        tag("code", layer.get("layer")),
        Digits(f"{digits(layer.get('rows'), '')}×{digits(layer.get('cols'), '')}"),
        Digits(f"{digits(layer.get('bits'))}/{digits(layer.get('act_bits'))}"),
        Digits("row") if group == 0 else digits(group),
        digits(layer.get("block") or None, ""),
        tag("span", layer.get("rotated_by"), " ", tag("b", why), class_="why"),
        scientific(layer.get("weight_nmse")),
        scientific(layer.get("weighted_nmse")),
        scientific(output),
        plots.bar(output, largest),
        digits(layer.get("rms"), "#.3g"),
        digits(layer.get("kurtosis"), "#.3g"),
        digits(layer.get("peak_to_rms"), "#.3g"),
        byte_size(size),
        plots.quotient(size, layer.get("bytes_fp16")),
    ]


def _worst(layers: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> Html:
    named = [
        join([f"#{row + 1} ", tag("code", layers[row].get("layer")), f" {scientific(layers[row]['output_nmse'])}"])
        for row in rows
    ]
    return tag("p", f"{count(len(layers), 'layer')}. Largest output NMSE: ", join(named, ", ") or DASH, ".")


def _reasons(uses: Mapping[str, int]) -> Html:
    items = [
        tag("li", reason, tag("span", f" {count(layers, 'layer')}", class_="note")) for reason, layers in uses.items()
    ]
    return join([tag("h3", "Why each rotation"), tag("ol", *items, class_="reasons")]) if items else Html("")


def _histograms(report: Report, _: Samples | None) -> Html | None:
    found = report.get("histograms") or []
    pictures = [_histogram(f"histogram {number}", entry) for number, entry in enumerate(found)]
    return tag("div", *pictures, class_="three") if found else None


def _histogram(name: str, entry: Mapping[str, Any]) -> Html:
    edges, counts, levels = (entry[key] for key in ("edges", "counts", "levels"))
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    beyond = [n for x, n in zip(centres, counts, strict=True) if levels and not levels[0] <= x <= levels[-1]]
    share = sum(beyond) / (sum(counts) or 1)
    outside = f"{count(sum(counts), 'weight')}, {100 * share:.2g} % beyond the outer levels"
    listed = " ".join(f"{level:g}" for level in levels)
    caption = [tag("span", f"{outside}. {count(len(levels), 'level')}: "), tag("span", listed, class_="n")]
    picture = plots.histogram(name, edges, counts, levels)
    return tag("div", tag("h3", tag("code", entry.get("layer"))), picture, tag("p", *caption, class_="note"))


# ----------------------------------------------------------------------------------------- passes, sizes, the rest


def _passes(report: Report, _: Samples | None) -> Html | None:
    passes = report.get("passes") or []
    if not passes:
        return None
    named = [(tag("code", one.get("name")), one) for one in passes]
    rows = [
        (name, digits(one.get("fired")), scientific(one.get("nmse")), _misses(one.get("skipped")))
        for name, one in named
    ]
    return table(("Pass", "Fired", "NMSE against before", "Near misses"), rows)


def _misses(skipped: Sequence[Mapping[str, str]] | None) -> Any:
    """Nodes that a pass looked at and left, under the reason they share."""
    if not skipped:
        return "none"
    nodes: dict[str, list[str]] = {}
    for miss in skipped:
        nodes.setdefault(str(miss.get("reason")), []).append(str(miss.get("node")))
    items = [tag("li", f"{reason}: ", tag("code", ", ".join(named))) for reason, named in nodes.items()]
    summary = f"{count(len(skipped), 'node')}, {count(len(nodes), 'reason')}"
    return plots.folded(summary, tag("ul", *items))


SIZES = (
    ("source_fp16_bytes", "source, all weights as fp16"),
    ("model_bytes", "model.onnx with its data"),
    ("packed_bytes", "of it: quantized weights, packed"),
    ("kept_float_bytes", "of it: kept in floating point"),
    ("engine_bytes", "engine"),
)


def _sizes(report: Report, _: Samples | None) -> Html | None:
    sizes = report.get("sizes") or {}
    if not sizes:
        return None
    whole, largest = sizes.get("source_fp16_bytes"), max(sizes.get(key) or 0 for key, _ in SIZES)
    found = [(title, sizes.get(key)) for key, title in SIZES]
    rows = [
        (title, byte_size(size), digits(size), plots.quotient(size, whole), plots.bar(size, largest))
        for title, size in found
    ]
    share = tag("b", digits(sizes.get("packed_ratio"), ".3f"), class_="n")
    line = tag("p", "Quantized weights, packed, against the same weights in fp16: ", share)
    return join([line, table(("What", "Size", "Bytes", "of source", ""), rows)])


def _timings(report: Report, _: Samples | None) -> Html | None:
    timings, peak = report.get("timings") or [], report.get("peak_memory_bytes")
    if not timings and peak is None:
        return None
    seconds = [entry.get("seconds") or 0 for entry in timings]
    total, longest = sum(seconds), max(seconds, default=0)
    rows = [
        (one.get("stage"), digits(one.get("seconds"), ",.2f"), plots.bar(one.get("seconds"), longest))
        for one in timings
    ]
    line = tag("p", f"Total {digits(total, ',.1f')} s; peak memory {byte_size(peak)}.")
    return join([line, table(("Stage", "Seconds", ""), rows) if rows else ""])


def _origin(report: Report, _: Samples | None) -> Html | None:
    tool, machine, source = (report.get(key) or {} for key in ("tool", "machine", "source"))
    facts = {key: machine.get(key) for key in ("processor", "cores", "features")}
    versions = {tool.get("name") or "lrq-export": tool.get("version"), **(tool.get("libraries") or {})}
    parts = {"Recipe": report.get("recipe") or {}, "Source": source, "Versions": versions, "Machine": facts}
    return join(plots.folded(title, pairs(_flat(tree))) for title, tree in parts.items())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys as dotted names, in their own order."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else value))
    return rows


# ------------------------------------------------------------------------------------------------------------ page

SECTIONS = (
    Section(
        "ladder",
        "Parity ladder",
        "Each rung compares two neighbours on the way from source to engine, so that a failure has one cause. "
        "Good: every dot inside its band, further left is better (a PSNR of d dB stands at 10^(-d/10)).",
        _ladder,
        "No rung was run: nothing is proven.",
    ),
    Section("warnings", "Warnings", "What the build could not do as asked. Good: none.", _warnings, "None."),
    Section(
        "samples",
        "Samples",
        "Images drawn from the same seeds with both models. Good: nothing to see but the difference's noise.",
        _samples,
        "No images were sampled in this run.",
    ),
    Section(
        "errors",
        "Error by timestep and by step",
        "NMSE against the floating-point model. Good: flat or rising slowly; a peak names timesteps to calibrate on.",
        _errors,
        "No error over time was measured in this run.",
    ),
    Section(
        "layers",
        "Layers",
        "Every quantized layer with its error on calibration inputs. Good: no layer far above the others.",
        _layers,
        "No layer is recorded.",
    ),
    Section(
        "histograms",
        "Weights and levels",
        "Rotated weights over their row's scale, in integer units, and the levels that rows use (ticks). "
        "Good: levels dense where weights are dense, few weights beyond the outer levels.",
        _histograms,
        "No histogram was recorded in this run.",
    ),
    Section(
        "passes",
        "Graph passes",
        "How often each rewrite fired, and the nodes it looked at and left, with the reason. Good: NMSE near rounding.",
        _passes,
        "No pass was run.",
    ),
    Section("sizes", "Sizes", "Bytes on disk. Good: short bars below the source's.", _sizes),
    Section("timings", "Timings", "Wall-clock seconds of each stage of this build.", _timings),
    Section("origin", "Recipe and versions", "What it takes to make this package again.", _origin),
)
