"""The pictures of the comparison page: ours in the accent colour, what was published in grey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lrq_export.comparison.ranking import EQUAL, Report, Row, decibels, not_measured, rows_at, settings
from lrq_export.verify.markup import Html, scientific
from lrq_export.verify.plots import ACCENT, INK, MARK, drawing

WIDTH = 5.6  # inches, of one of two pictures beside each other
BAR, FRAME = 0.24, 0.55  # inches of height: of one bar, and of the axis with its label
CURVES = 2.6  # inches of height that curves take at least
LABEL = 0.15  # inches between the names of two curves
FAINT = 0.45  # opacity of what was published

Point = tuple[float, float]


def psnr_bars(name: str, rows: Sequence[Row]) -> Html:
    """Mean PSNR of each row as a bar, each seed as a dot; what has no finite value has its sign in place of a bar."""
    with drawing(name, WIDTH, FRAME + BAR * len(rows)) as (axes, svg):
        for place, row in enumerate(rows):
            seeds = [value for value in row["psnr_db_by_seed"] if _is_finite(value)]
            if _is_finite(row["psnr_db"]):
                _bar(axes, row, place, 0.0, row["psnr_db"])
                axes.plot(seeds, [place] * len(seeds), "o", color=MARK, markersize=3, markeredgewidth=0)
                seeds.append(row["psnr_db"])
            _number(axes, place, max(seeds, default=0.0), decibels(row["psnr_db"]))
        _finish_bars(axes, rows, "mean PSNR in dB; a dot for each seed")
    return Html(svg.getvalue())


def noise_bars(name: str, rows: Sequence[Row]) -> Html:
    """ε-NMSE of each row as a bar on a log scale; what is zero or not finite has its number in place of a bar."""
    drawn = [row["noise_nmse"] for row in rows if row["noise_nmse"] and _is_finite(row["noise_nmse"])]
    # Bars need a foot, which a log scale does not have: the decade below the smallest.
    foot = 10.0 ** math.floor(math.log10(min(drawn)) - 0.2) if drawn else 0.1
    with drawing(name, WIDTH, FRAME + BAR * len(rows)) as (axes, svg):
        axes.set_xscale("log")
        for place, row in enumerate(rows):
            end = row["noise_nmse"] if row["noise_nmse"] in drawn else foot
            _bar(axes, row, place, foot, end)
            _number(axes, place, end, scientific(row["noise_nmse"]))
        axes.set_xlim(foot, 4 * max(drawn, default=1.0))  # room for the numbers
        axes.xaxis.set_major_formatter(lambda value, _: scientific(value, 0))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        _finish_bars(axes, rows, "NMSE of the predicted noise")
    return Html(svg.getvalue())


def psnr_against_size(name: str, report: Report, act_bits: int) -> Html | None:
    """PSNR over bits a weight, side data included: one curve a method over the weight's bits, its name at the end.

    None where no method has a finite value.
    """
    curves = _curves(report, act_bits)
    if not curves:
        return None
    height = max(CURVES, BAR * len(curves))
    sizes, values = zip(*(point for _, points in curves for point in points), strict=True)
    inch = 1.1 * ((max(values) - min(values)) or 1.0) / height  # in dB; the axis is a tenth longer than its values
    labels = spread([points[-1][1] for _, points in curves], LABEL * inch)
    with drawing(name, WIDTH, FRAME + height) as (axes, svg):
        for (row, points), label in zip(curves, labels, strict=True):
            colour = _colour(row)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1, markersize=3.2, markeredgewidth=0)
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
            at = max(sizes) + 0.06 * ((max(sizes) - min(sizes)) or 1.0), label
            axes.annotate(row["title"], points[-1], at, color=colour, fontsize=8, va="center", arrowprops=leader)
        axes.set_xlabel("bits a weight, side data included")
        axes.set_ylabel("mean PSNR in dB")
    return Html(svg.getvalue())


def spread(values: Sequence[float], gap: float) -> list[float]:
    """A place for the label of each value: in their order, no two nearer than `gap`, each group of labels that would
    touch centred on the mean of its values."""
    groups: list[list[int]] = []  # from below; the members of each, too
    middles: list[float] = []
    for index in sorted(range(len(values)), key=values.__getitem__):
        members, middle = [index], values[index]
        while groups and middle - middles[-1] < gap * (len(members) + len(groups[-1])) / 2:
            members = groups.pop() + members
            middles.pop()
            middle = sum(values[member] for member in members) / len(members)
        groups.append(members)
        middles.append(middle)
    places = [0.0] * len(values)
    for members, middle in zip(groups, middles, strict=True):
        for step, member in enumerate(members):
            places[member] = middle + gap * (step - (len(members) - 1) / 2)
    return places


def _curves(report: Report, act_bits: int) -> list[tuple[Row, list[Point]]]:
    """(a row of the method, its points from the fewest bits on) for every method that has any."""
    found: dict[str, tuple[Row, list[Point]]] = {}
    for setting in settings(report):
        for row in rows_at(report, setting):
            if row["act_bits"] == act_bits and _is_finite(row["psnr_db"]):
                _, points = found.setdefault(row["method"], (row, []))
                points.append((row["bits_per_weight"], row["psnr_db"]))
    return [(row, sorted(points)) for row, points in found.values()]


def _is_finite(value: float | None) -> bool:
    return not not_measured(value) and -EQUAL < value < EQUAL


def _colour(row: Row) -> str:
    return INK if row["published"] else ACCENT


def _bar(axes: Any, row: Row, place: int, foot: float, end: float) -> None:
    alpha = FAINT if row["published"] else 1.0
    axes.barh(place, end - foot, left=foot, height=0.62, color=_colour(row), alpha=alpha, linewidth=0)


def _number(axes: Any, place: int, end: float, text: str) -> None:
    axes.annotate(text, (end, place), (5, 0), textcoords="offset points", fontsize=8, va="center")


def _finish_bars(axes: Any, rows: Sequence[Row], xlabel: str) -> None:
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    axes.set_xlabel(xlabel)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)
