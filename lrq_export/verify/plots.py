"""The look of the report page: how it writes text, numbers and tables, its pictures, and its style sheet.

Equal numbers give equal bytes: no dates, no random ids. A picture takes its colours from the CSS variables of the page
it stands in, so that the same one is right on light, on dark and on paper.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

# Placeholders that matplotlib takes for colours; `_inline` puts the page's variables in their place.
INK, GRID, ACCENT, MARK = "#010101", "#020202", "#030303", "#040404"
CSS_COLOURS = {INK: "var(--soft)", GRID: "var(--line)", ACCENT: "var(--accent)", MARK: "var(--mark)"}

STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, and set in the page's font
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "axes.formatter.use_mathtext": False,
}
PLAIN_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}

DASH = "–"
PSNR_METRIC = "PSNR dB"
GAUGE_DECADES = 16  # the ladder's scale runs from 1e-16 to 1
AMPLIFICATIONS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LARGEST_SIDE = 256  # pixels of an embedded image; larger ones are averaged down


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


def scientific(value: float | None) -> Digits:
    """3.2e-4; a plain 0 for zero."""
    text = digits(value, ".1e" if value else ".0f")
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


def folded(summary: Any, *content: Any) -> Html:
    return tag("details", tag("summary", summary), *content)


def image_triple(float_: np.ndarray, quantized: np.ndarray, factor: int, caption: Html) -> Html:
    difference = np.abs(quantized - float_) * factor - 1
    pictures = {"floating point": float_, "quantized": quantized, f"difference times {factor}": difference}
    images = [Html(f'<img src="{png(image)}" alt="{alt}">') for alt, image in pictures.items()]
    return tag("figure", tag("div", *images), caption)


def image_legend(float_: np.ndarray, factor: int, shown: int) -> str:
    """How the pictures of `image_triple` are to be read."""
    number, channels, *size = float_.shape
    colour = "" if channels in (1, 3) else f" False colour: the first {min(channels, 3)} of {channels} channels as RGB."
    fewer = f" The first {shown} of {number} are shown." if number > shown else ""
    smaller = " Averaged down to fit the page." if max(size) > LARGEST_SIDE else ""
    order = f"Left floating point, middle quantized, right |difference| × {factor} (black: equal)."
    return f"{order} {size[0]}×{size[1]} pixels.{smaller}{colour}{fewer}"


def bar(value: float | None, largest: float) -> Html:
    share = value / largest if value and largest and math.isfinite(value) else 0
    return tag("span", tag("i", style=f"width:{100 * share:.1f}%"), class_="bar")


def gauge(metric: str | None, value: float | None, bound: float | None, state: str) -> Html:
    """The value as a dot and what the bound allows as a band, on one log scale; further left is better."""
    band = [] if bound is None else [tag("i", style=f"width:{_share(_decade(metric, bound)):.1f}%")]
    dot = [] if value is None else [tag("b", style=at(_decade(metric, value)), class_=state)]
    return tag("span", *band, *dot, class_="gauge")


def _decade(metric: str | None, value: float) -> float:
    """log10 of an error; a PSNR of d dB stands for a relative error of 10^(-d/10)."""
    if math.isnan(value):
        return 0.0
    if metric == PSNR_METRIC:
        return -value / 10
    return -math.inf if value <= 0 else math.log10(value)


def _share(decade: float) -> float:
    return 100 * min(max((decade + GAUGE_DECADES) / GAUGE_DECADES, 0.0), 1.0)


def at(decade: float) -> str:
    return f"left:{_share(decade):.1f}%"


def curve(name: str, xs: Sequence[float], ys: Sequence[float], xlabel: str, ylabel: str, falling: bool = False) -> Html:
    """One line with a dot per value, on a log scale where the values allow it; `falling` runs the x axis backwards."""
    with _axes(name, 5.6, 2.3) as (axes, svg):
        axes.plot(xs, ys, "o-", color=ACCENT, markersize=3, linewidth=1.2, markeredgewidth=0)
        _label(axes, ys, xlabel, ylabel)
        axes.locator_params(axis="x", integer=max(xs) > 1)
        if falling:
            axes.invert_xaxis()
    return Html(svg.getvalue())


def dots(name: str, ys: Sequence[float | None], marked: Sequence[int], xlabel: str, ylabel: str) -> Html:
    """One dot per row, counted from 1; the rows in `marked` (from 0) stand out, each with its number."""
    with _axes(name, 11.4, 2.1) as (axes, svg):
        values = [math.nan if y is None else y for y in ys]
        axes.plot(range(1, len(ys) + 1), values, "o", color=ACCENT, markersize=3.2, markeredgewidth=0)
        for row in marked:
            axes.plot(row + 1, values[row], "D", color=MARK, markersize=4.5, markeredgewidth=0)
            axes.annotate(str(row + 1), (row + 1, values[row]), xytext=(5, 1), textcoords="offset points", fontsize=8)
        _label(axes, values, xlabel, ylabel)
        axes.set_xlim(0, len(ys) + 1)
        axes.margins(y=0.12)
    return Html(svg.getvalue())


def histogram(name: str, edges: Sequence[float], counts: Sequence[int], levels: Sequence[float]) -> Html:
    """Weights in integer units as a filled outline; the codebook's levels as ticks below and faint lines through it."""
    with _axes(name, 3.7, 1.55) as (axes, svg):
        axes.stairs(counts, edges, fill=True, color=ACCENT, alpha=0.55, linewidth=0)
        axes.vlines(levels, 0, 1, transform=axes.get_xaxis_transform(), color=MARK, linewidth=0.5, alpha=0.45)
        axes.vlines(levels, -0.11, 0, transform=axes.get_xaxis_transform(), color=MARK, linewidth=1.2, clip_on=False)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(bottom=0)
        axes.set_xticks([-127, -64, 0, 64, 127])
        axes.set_xlim(min(-130, edges[0]), max(130, edges[-1]))
        axes.tick_params(axis="x", pad=11, length=0)
    return Html(svg.getvalue())


def _label(axes: Any, ys: Sequence[float], xlabel: str, ylabel: str) -> None:
    positive = [y for y in ys if y > 0]
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if positive:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(lambda value, _: scientific(value).replace(".0e", "e"))
        if max(positive) < 30 * min(positive):  # too few decades to read from decades alone
            axes.yaxis.set_major_locator(_one_two_five())
        axes.yaxis.set_minor_formatter(lambda value, _: "")


def _one_two_five() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5))


@contextmanager
def _axes(name: str, width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """Axes to draw on, in inches, and the buffer that holds the picture's inline SVG once the block has ended."""
    from matplotlib import rc_context  # heavy, and needed by no other stage
    from matplotlib.figure import Figure

    # The name salts the ids of clip paths and markers: pictures of one page share no id.
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        svg, raw = io.StringIO(), io.StringIO()
        yield figure.subplots(), svg
        figure.savefig(raw, format="svg", transparent=True, metadata=PLAIN_METADATA)
    svg.write(_inline(raw.getvalue()))


def _inline(document: str) -> str:
    """The <svg> element of a matplotlib file, without namespaces, fonts, page-wide styles and numbered ids."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # figure_1, axes_1, ...: in every picture, used by none
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    for placeholder, variable in CSS_COLOURS.items():
        svg = svg.replace(placeholder, variable)
    return svg


def amplification(difference: np.ndarray) -> int:
    """The largest round factor that keeps 99.5 % of |difference| (in units of the full range, 2) within the range."""
    finite = difference[np.isfinite(difference)]
    peak = float(np.quantile(finite, 0.995)) if finite.size else 0.0
    fitting = [factor for factor in AMPLIFICATIONS if factor * peak <= 2]
    return max(fitting, default=1)


def png(image: np.ndarray) -> str:
    """A (c, h, w) image in [-1, 1] as a PNG data URL: 1 channel grey, otherwise the first three as red, green, blue."""
    from matplotlib.image import imsave

    planes = np.repeat(image, 3, axis=0) if len(image) == 1 else image[:3]
    missing = 3 - len(planes)
    planes = np.pad(_averaged(planes), ((0, missing), (0, 0), (0, 0)), constant_values=-1)
    pixels = np.nan_to_num(planes, nan=-1, posinf=1, neginf=-1).clip(-1, 1)
    pixels = np.round((pixels + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(pixels), format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _averaged(planes: np.ndarray) -> np.ndarray:
    """Blocks of f by f pixels averaged, f the smallest that brings both sides to LARGEST_SIDE."""
    factor = math.ceil(max(planes.shape[1:]) / LARGEST_SIDE)
    if factor <= 1:
        return planes
    height, width = (side // factor for side in planes.shape[1:])
    cropped = planes[:, : height * factor, : width * factor]
    return cropped.reshape(len(planes), height, factor, width, factor).mean(axis=(2, 4))


STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1c2024; --soft: #5f6a74; --line: #d9dee3; --panel: #f5f7f9;
  --accent: #2f6fb3; --mark: #c2570c; --good: #1a7a3d; --bad: #b3261e; --band: #cfe8d6;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #15181b; --ink: #e4e8eb; --soft: #9aa5af; --line: #343b42; --panel: #1d2226;
    --accent: #6ba6e4; --mark: #f0984f; --good: #6cc98d; --bad: #ff8a80; --band: #24452f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 1320px;
  background: var(--page); color: var(--ink); font: 14px/1.5 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h1 small { color: var(--soft); font-weight: normal; margin-left: .5rem; }
h2 { margin: 0; font-size: 1.15rem; }
h3 { margin: .75rem 0 .25rem; font-size: .9rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; padding: .5rem 0; font-size: .9rem; }
section { margin-top: 1.75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
code, .n, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .92em; }
.n { font-variant-numeric: tabular-nums; }
.line, .note, .empty { color: var(--soft); }
.line { max-width: 62rem; margin: .15rem 0 .75rem; }
.note { font-size: .86em; }
.empty { font-style: italic; }

.verdict {
  margin: .75rem 0; padding: .6rem .9rem; border-left: 5px solid var(--soft); background: var(--panel);
  font-size: 1.05rem;
}
.verdict.pass { border-color: var(--good); }
.verdict.fail { border-color: var(--bad); }
.mark { white-space: nowrap; color: var(--soft); }
.mark.pass { color: var(--good); font-weight: 600; }
.mark.fail { color: var(--bad); font-weight: 700; }

table { border-collapse: collapse; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-size: .86em; font-weight: 600; vertical-align: bottom; }
th.n { font-family: inherit; }
th.n, td.n { text-align: right; white-space: nowrap; }
dl { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: .5rem 0; font-size: .9em; }
dl div { display: flex; gap: .45rem; max-width: 100%; }
dt { color: var(--soft); white-space: nowrap; }
dd { margin: 0; overflow-wrap: anywhere; }
.ladder { width: 100%; }
.metric { white-space: nowrap; }
.ladder td:last-child, .ladder th:last-child { width: 24%; min-width: 13rem; padding-inline: 1.2rem; }
.scroll { max-height: 44rem; overflow: auto; border: 1px solid var(--line); margin: .75rem 0; }
.scroll table { width: 100%; }
.scroll thead th { position: sticky; top: 0; background: var(--panel); box-shadow: 0 1px var(--line); border: 0; }
.compact { font-size: 12px; line-height: 1.3; }
.compact th, .compact td { padding: .16rem .3rem; white-space: nowrap; }
.compact th { white-space: normal; }
.compact .why { display: inline-block; min-width: 11rem; white-space: normal; }
.compact .why b { color: var(--soft); font-weight: normal; }
.compact tbody tr:hover { background: var(--panel); }
.reasons { margin: .3rem 0; padding-left: 1.6rem; columns: 2; column-gap: 3rem; font-size: .92em; }
.warnings { margin: 0; padding-left: 1.2rem; }
.warnings li::marker { content: "! "; color: var(--mark); font-weight: 700; }

.bar { display: inline-block; width: 6rem; height: .6rem; background: var(--panel); }
.compact .bar { width: 2.5rem; }
.bar i { display: block; height: 100%; background: var(--accent); }
.gauge {
  display: block; position: relative; height: .5rem; margin-top: .45rem;
  background: var(--panel); border: 1px solid var(--line);
}
.gauge i { position: absolute; inset: 0 auto 0 0; background: var(--band); border-right: 2px solid var(--good); }
.gauge b {
  position: absolute; top: 50%; width: .8rem; height: .8rem; margin: -.4rem;
  border-radius: 50%; background: var(--soft);
}
.gauge b.pass { background: var(--good); }
.gauge b.fail { background: var(--bad); border-radius: 0; transform: rotate(45deg); }
.ticks { display: block; position: relative; height: 1.3em; font-weight: normal; }
.ticks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }

.grid { display: grid; gap: .9rem 1.4rem; margin-top: .75rem; }
.grid { grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(560px, 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure div { display: flex; gap: 3px; }
figure img { width: 33%; image-rendering: pixelated; outline: 1px solid var(--line); }
figcaption { display: flex; justify-content: space-between; font-size: .86em; }
figcaption em { color: var(--mark); font-style: normal; }
.pair, .three { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: .5rem 2rem; }
.three { grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.three .n { overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
details { margin: .25rem 0; }
summary { cursor: pointer; color: var(--accent); }
td details { margin: 0; }
td ul { margin: .2rem 0; padding-left: 1.1rem; max-width: 44rem; overflow-wrap: anywhere; }

@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .scroll { max-height: none; overflow: visible; border: 0; }
  .scroll thead th { position: static; }
  .compact { font-size: 6.5pt; }
  .compact th, .compact td { padding: .1rem .2rem; }
  tr, .pair > div, .three > div, h2, h3 { break-inside: avoid; break-after: auto; }
  h2, h3, .line { break-after: avoid; break-inside: avoid; }
  figure img { outline: 0; }
  details::details-content { content-visibility: visible; }
  * { print-color-adjust: exact; }
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
