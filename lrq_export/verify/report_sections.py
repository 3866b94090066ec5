"""The sections of the report page: what each shows of report.json. What a report leaves out is said to be missing."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from lrq_export.verify import plots
from lrq_export.verify.graph_picture import Graphs, show_blocks
from lrq_export.verify.markup import (
    PSNR_METRIC,
    Digits,
    Html,
    byte_size,
    count,
    digits,
    flat,
    folded,
    join,
    measure,
    pairs,
    quotient,
    scientific,
    table,
    tag,
)
from lrq_export.verify.metrics import psnr
from lrq_export.verify.report_engines import show_engines
from lrq_export.verify.report_layers import show_histograms, show_layers

RUNGS = ("R0", "R1", "R2", "R3", "R4", "R5")
MOST_IMAGES = 24
SMALL_SIDE = 64  # images up to this side are magnified less wide than larger ones

Report = Mapping[str, Any]
Samples = Mapping[str, np.ndarray]


class Exhibits(NamedTuple):
    """What a page shows besides report.json."""

    samples: Samples | None = None
    graphs: Graphs | None = None


class Section(NamedTuple):
    """One part of the page. `body` returns None when the report holds nothing for it; `empty` then says so."""

    anchor: str
    title: str
    line: str  # what it shows and what is good
    body: Callable[[Report, Exhibits], Html | None]
    empty: str = "This report holds nothing for it."


# ---------------------------------------------------------------------------------------------------------- ladder

MARKS = {"pass": "✓ pass", "fail": "✗ FAIL", "open": "○ no bound", "absent": "– not run"}


def mark(state: str) -> Html:
    return tag("span", MARKS[state], class_=f"mark {state}")


def _ladder(report: Report, _: Exhibits) -> Html | None:
    rungs = report.get("ladder") or []
    if not rungs:
        return None
    ticks = [tag("span", f"1e-{decade}" if decade else "1", style=plots.at(-decade)) for decade in (16, 12, 8, 4, 0)]
    heads = ("Result", "Rung", "What is compared", "A failure blames", "Metric", "Value", "Bound")
    named = {rung.get("rung") for rung in rungs}
    every = [*rungs, *({"rung": name} for name in RUNGS if name not in named)]
    rows = [_rung(rung) for rung in sorted(every, key=lambda rung: str(rung.get("rung")))]
    return table([*heads, tag("span", *ticks, class_="ticks")], rows, "ladder")


def state_of(rung: Mapping[str, Any]) -> str:
    if rung.get("passed") is None:
        return "absent" if rung.get("value") is None else "open"
    return "pass" if rung["passed"] else "fail"


def _rung(rung: Mapping[str, Any]) -> list[Any]:
    metric, value, bound, note = (rung.get(key) for key in ("metric", "value", "bound", "note"))
    state = state_of(rung)
    limit = "" if bound is None else "≥ " if metric == PSNR_METRIC else "≤ "
    title = join([rung.get("title"), tag("div", note, class_="note") if note else Html("")])
    name = tag("b", rung.get("rung"))
    figures = [measure(metric, value), Digits(limit + measure(metric, bound))]
    return [
        mark(state),
        name,
        title,
        rung.get("blames"),
        tag("span", metric, class_="metric"),
        *figures,
        plots.gauge(metric, value, bound, state),
    ]


def _warnings(report: Report, _: Exhibits) -> Html | None:
    found = report.get("warnings") or []
    return tag("ul", *(tag("li", warning) for warning in found), class_="warnings") if found else None


# --------------------------------------------------------------------------------------------------------- samples


def _samples(report: Report, shown: Exhibits) -> Html | None:
    images, samples = report.get("images") or {}, shown.samples
    if samples is None:
        return _image_table(images)
    float_, quantized = (np.asarray(samples[key], np.float32) for key in ("float", "quantized"))
    number = min(len(float_), MOST_IMAGES)
    if not number:
        return None
    measured = images.get("psnr_db") or []
    if len(measured) != len(float_):  # of other images than these
        images = {**images, "psnr_total_db": None}
        measured = [psnr(*pair) for pair in zip(quantized, float_, strict=True)]
    factor = plots.amplification(np.abs(quantized[:number] - float_[:number]))
    worst = min(range(number), key=lambda index: _ranked(measured[index]))
    wide = "grid wide" if max(float_.shape[2:]) > SMALL_SIDE else "grid"
    captions = [_caption(images, index, measured[index], index == worst) for index in range(number)]
    triples = [plots.image_triple(float_[index], quantized[index], factor, captions[index]) for index in range(number)]
    shown = images.get("shown") or ""
    legend = tag("p", _summary(images, measured), " ", plots.image_legend(float_, factor, number), " ", shown)
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


def _errors(report: Report, _: Exhibits) -> Html | None:
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
    numbers = folded(f"{count(len(rows), 'value')}", table([*keys.values(), "NMSE"], rows))
    return tag("div", tag("h3", title), picture, tag("p", line, class_="note"), numbers)


# ----------------------------------------------------------------------------------------- passes, sizes, the rest


def _passes(report: Report, _: Exhibits) -> Html | None:
    passes = report.get("passes") or []
    if not passes:
        return None
    named = [(tag("code", one.get("name")), one) for one in passes]
    rows = [
        (name, one.get("refused") or digits(one.get("fired")), scientific(one.get("nmse")), _misses(one.get("skipped")))
        for name, one in named
    ]
    return table(("Pass", "Fired", "NMSE against before", "Near misses"), rows)


def _blocks(_: Report, shown: Exhibits) -> Html | None:
    return None if shown.graphs is None else show_blocks(*shown.graphs)


def _misses(skipped: Sequence[Mapping[str, str]] | None) -> Any:
    """Nodes that a pass looked at and left, under the reason they share."""
    if not skipped:
        return "none"
    nodes: dict[str, list[str]] = {}
    for miss in skipped:
        nodes.setdefault(str(miss.get("reason")), []).append(str(miss.get("node")))
    items = [tag("li", f"{reason}: ", tag("code", ", ".join(named))) for reason, named in nodes.items()]
    summary = f"{count(len(skipped), 'node')}, {count(len(nodes), 'reason')}"
    return folded(summary, tag("ul", *items))


SIZES = (
    ("source_fp16_bytes", "source, all weights as fp16"),
    ("model_bytes", "model.onnx with its data"),
    ("packed_bytes", "of it: quantized weights, packed"),
    ("kept_float_bytes", "of it: kept in floating point"),
    ("engine_bytes", "engine"),
)


def _sizes(report: Report, _: Exhibits) -> Html | None:
    sizes = report.get("sizes") or {}
    if not sizes:
        return None
    whole, largest = sizes.get("source_fp16_bytes"), max(sizes.get(key) or 0 for key, _ in SIZES)
    found = [(title, sizes.get(key)) for key, title in SIZES]
    rows = [
        (title, byte_size(size), digits(size), quotient(size, whole), plots.bar(size, largest)) for title, size in found
    ]
    share = tag("b", digits(sizes.get("packed_ratio"), ".3f"), class_="n")
    line = tag("p", "Quantized weights, packed, against the same weights in fp16: ", share)
    return join([line, table(("What", "Size", "Bytes", "of source", ""), rows)])


def _timings(report: Report, _: Exhibits) -> Html | None:
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


def _origin(report: Report, _: Exhibits) -> Html | None:
    tool, machine, source = (report.get(key) or {} for key in ("tool", "machine", "source"))
    facts = {key: machine.get(key) for key in ("processor", "cores", "features", "gpus", "driver") if key in machine}
    versions = {tool.get("name") or "lrq-export": tool.get("version"), **(tool.get("libraries") or {})}
    parts = {"Recipe": report.get("recipe") or {}, "Source": source, "Versions": versions, "Machine": facts}
    return join(folded(title, pairs(flat(tree))) for title, tree in parts.items())


# -------------------------------------------------------------------------------------------------------- sections

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
        show_layers,
        "No layer is recorded.",
    ),
    Section(
        "histograms",
        "Weights and levels",
        "Rotated weights over their row's scale, in integer units, and the levels, averaged over rows (ticks). "
        "Good: levels dense where weights are dense, few weights beyond the outer levels.",
        show_histograms,
        "No histogram was recorded in this run.",
    ),
    Section(
        "passes",
        "Graph passes",
        "How often each rewrite fired, and the nodes it looked at and left, with the reason. Good: NMSE near rounding.",
        _passes,
        "No pass was run.",
    ),
    Section(
        "blocks",
        "What the passes did to one block",
        "The first block of each kind as traced, and what is left to compute of it. Good: little orange on the right.",
        _blocks,
        "No graphs were handed to this page, or no two of their blocks hold the same quantized layers.",
    ),
    Section("sizes", "Sizes", "Bytes on disk. Good: short bars below the source's.", _sizes),
    Section(
        "engines",
        "Engines",
        "What each target's folder holds, all bytes of an engine over all parameters. Good: few bits, every lrq node a "
        "plugin layer.",
        show_engines,
    ),
    Section("timings", "Timings", "Wall-clock seconds of each stage of this build.", _timings),
    Section("origin", "Recipe and versions", "What it takes to make this package again.", _origin),
)
