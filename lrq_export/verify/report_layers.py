"""The report page's table of quantized layers, and their weights drawn against the levels of their codebooks."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lrq_export.verify import plots
from lrq_export.verify.markup import (
    DASH,
    Digits,
    Html,
    byte_size,
    count,
    digits,
    folded,
    join,
    pairs,
    quotient,
    scientific,
    table,
    tag,
)

MOST_WORST = 5

LAYER_HEADS = (
    "#", "Layer", "Shape", "Bits", "Group", "Block", "Rotated by, and why",
    "Weight NMSE", "Weighted", "Output NMSE", "", "J", "Kurtosis", "Peak/RMS", "Bytes", "of fp16",
)  # fmt: skip
LAYER_TERMS = (
    ("Bits", "weight / activation; activation 16 stays in floating point"),
    ("Group", "columns that share a codebook; row = the whole row"),
    ("Block", "channels per rotation; eq.: channels are equalized first, divided here and multiplied in the weight"),
    ("Weight NMSE", "error of the weights alone"),
    ("Weighted", "the same, columns weighted by the input's second moment"),
    ("Output NMSE", "error of the layer's output, bar relative to the worst layer"),
    ("J", "RMS of the input"),
    ("Kurtosis", "of the input; 3 is Gaussian, more means outliers"),
)


def show_layers(report: Mapping[str, Any], _: Any) -> Html | None:
    layers = report.get("layers") or []
    if not layers:
        return None
    reasons = Counter(layer["reason"] for layer in layers if layer.get("reason"))
    errors = [layer.get("output_nmse") for layer in layers]
    measured = [(value, row) for row, value in enumerate(errors) if value is not None and math.isfinite(value)]
    worst = [row for _, row in sorted(measured, reverse=True)[:MOST_WORST]]
    largest = measured and max(measured)[0]
    rows = [_layer(number, layer, list(reasons), largest) for number, layer in enumerate(layers, 1)]
    every = tag("div", table(LAYER_HEADS, rows, "compact"), class_="scroll")
    overview = plots.dots("layers", errors, worst, "layer, in the table's order", "output NMSE") if measured else ""
    legend = _reasons(reasons)
    return join([_worst(layers, worst), overview, legend, every, pairs(LAYER_TERMS)], "\n")


def _layer(number: int, layer: Mapping[str, Any], reasons: Sequence[str], largest: float) -> list[Any]:
    """One row; the reason stands as its number in the list above the table: it can be long, and of several layers."""
    reason, group = layer.get("reason"), layer.get("group_size")
    why = f"[{reasons.index(reason) + 1}]" if reason in reasons else None
    output, size = layer.get("output_nmse"), layer.get("bytes")
    return [
        digits(number),
        tag("code", layer.get("layer")),
        Digits(f"{digits(layer.get('rows'), '')}×{digits(layer.get('cols'), '')}"),
        Digits(f"{digits(layer.get('bits'))}/{digits(layer.get('act_bits'))}"),
        Digits("row") if group in (0, layer.get("cols")) else digits(group),
        _block(layer),
        tag("span", layer.get("rotated_by"), " ", tag("b", why), class_="why"),
        scientific(layer.get("weight_nmse")),
        scientific(layer.get("weighted_nmse")),
        scientific(output),
        plots.bar(output, largest),
        digits(layer.get("rms"), "#.3g"),
        digits(layer.get("kurtosis"), "#.3g"),
        digits(layer.get("peak_to_rms"), "#.3g"),
        byte_size(size),
        quotient(size, layer.get("bytes_fp16")),
    ]


def _block(layer: Mapping[str, Any]) -> Digits:
    block = digits(layer.get("block") or None, "")
    if not layer.get("equalized"):
        return block
    return Digits("eq." if layer["block"] == 1 else f"{block} eq.")


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
    if not items:
        return Html("")
    return folded(f"Why each rotation: {count(len(items), 'reason')}", tag("ol", *items, class_="reasons"))


def show_histograms(report: Mapping[str, Any], _: Any) -> Html | None:
    found = report.get("histograms") or []
    pictures = [_histogram(f"histogram {number}", entry) for number, entry in enumerate(found)]
    return tag("div", *pictures, class_="three") if found else None


def _histogram(name: str, entry: Mapping[str, Any]) -> Html:
    edges, counts, levels = (entry[key] for key in ("edges", "counts", "levels"))
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    beyond = [n for x, n in zip(centres, counts, strict=True) if levels and not levels[0] <= x <= levels[-1]]
    share = sum(beyond) / (sum(counts) or 1)
    outside = f"{count(sum(counts), 'weight')}, {100 * share:.2g} % beyond the outer levels"
    listed = " ".join(f"{round(level, 1):g}" for level in levels)
    caption = [tag("span", f"{outside}. {count(len(levels), 'level')}: "), tag("span", listed, class_="n")]
    picture = plots.histogram(name, edges, counts, levels)
    return tag("div", tag("h3", tag("code", entry.get("layer"))), picture, tag("p", *caption, class_="note"))
