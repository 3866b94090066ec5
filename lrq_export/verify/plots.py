"""The pictures of offline pages: inline SVG, embedded PNG, and bars and gauges drawn with CSS.

Equal numbers give equal bytes: no dates, no random ids. A picture takes its colours from the CSS variables of the page
it stands in, so that the same one is right on light, on dark and on paper.
"""

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lrq_export.verify.markup import PSNR_METRIC, Html, scientific, tag

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
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}
PLAIN_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}

GAUGE_DECADES = 16  # the ladder's scale runs from 1e-16 to 1
AMPLIFICATIONS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LARGEST_SIDE = 256  # pixels of an embedded image; larger ones are averaged down


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
    with drawing(name, 5.6, 2.3) as (axes, svg):
        axes.plot(xs, ys, "o-", color=ACCENT, markersize=3, linewidth=1.2, markeredgewidth=0)
        _label(axes, ys, xlabel, ylabel)
        axes.locator_params(axis="x", integer=max(xs) > 1)
        if falling:
            axes.invert_xaxis()
    return Html(svg.getvalue())


def dots(name: str, ys: Sequence[float | None], marked: Sequence[int], xlabel: str, ylabel: str) -> Html:
    """One dot per row, counted from 1; the rows in `marked` (from 0) stand out, each with its number."""
    with drawing(name, 11.4, 2.1) as (axes, svg):
        values = [math.nan if y is None else y for y in ys]
        axes.plot(range(1, len(ys) + 1), values, "o", color=ACCENT, markersize=3.2, markeredgewidth=0)
        for row in marked:
            axes.plot(row + 1, values[row], "D", color=MARK, markersize=4.5, markeredgewidth=0)
            axes.annotate(str(row + 1), (row + 1, values[row]), xytext=(5, 1), textcoords="offset points", fontsize=8)
        _label(axes, values, xlabel, ylabel)
        axes.set_xlim(0, len(ys) + 1)
        axes.locator_params(axis="x", integer=True)
        axes.margins(y=0.12)
    return Html(svg.getvalue())


def histogram(name: str, edges: Sequence[float], counts: Sequence[int], levels: Sequence[float]) -> Html:
    """Weights in integer units as a filled outline; the codebook's levels as ticks below and faint lines through it."""
    with drawing(name, 3.7, 1.55) as (axes, svg):
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
        # Two decimals keep apart the ticks of errors that hardly differ.
        axes.yaxis.set_major_formatter(lambda value, _: re.sub(r"\.?0+e", "e", scientific(value, 2)))
        if max(positive) < 30 * min(positive):  # too few decades to read from decades alone
            axes.yaxis.set_major_locator(_one_two_five())
        axes.yaxis.set_minor_formatter(lambda value, _: "")


def _one_two_five() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5))


@contextmanager
def drawing(name: str, width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
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
