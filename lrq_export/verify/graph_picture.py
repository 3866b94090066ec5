"""A transformer block's graph as inline SVG, before and after the passes, for the report page.

Boxes stand in rows, each below all it reads from: rows by longest path, order within a row by the mean place of the
neighbours, and places by least squares with no two boxes closer than a gap. An edge that passes rows is drawn through
a place of its own in each, so that it crosses no box. Equal graphs give equal bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise, takewhile
from statistics import fmean
from typing import Any, NamedTuple

from graphs.traced import TracedGraph
from lrq_export.verify.block_graph import (
    FUSED,
    INPUT,
    LINEAR,
    OUTPUT,
    ROTATION,
    STANDARD,
    BlockGraph,
    Box,
    block_graph,
    repeated_blocks,
)
from lrq_export.verify.markup import Html, count, folded, join, tag

# Kind -> fill and text, the same on light and on dark, for the kinds that are to be found at a glance.
COLOURS = {ROTATION: ("#f28c28", "#241300"), FUSED: ("#8e5bb5", "#ffffff"), LINEAR: ("#2f6fb3", "#ffffff")}
PLAIN = ("var(--panel, #f5f7f9)", "var(--ink, #1c2024)")
KEYS = {
    ROTATION: "online rotation",
    FUSED: "rotation or residual fused with its neighbours",
    LINEAR: "linear layer with quantized weights",
    STANDARD: "any other operation",
}
LEFT_OUT = (
    "Dashed: what comes from elsewhere, named after the layer that made it, and what leaves. Softmax and products of "
    "an attention are one box, with what leads to them alone. Constants, sizes and changes of shape are left out."
)
LINE, SOFT = "var(--line, #d9dee3)", "var(--soft, #5f6a74)"

FONT, SMALL_FONT = 12, 10.5  # pixels, as all lengths below
ADVANCE = 0.57  # mean width of a letter, in heights of its font
PADDING, BOX_GAP, LANE, ROW_GAP, MARGIN = 9, 14, 14, 20, 6
LONGEST = 32  # letters of a label
SWEEPS = 12
# How hard an edge pulls at a box: one that alone leads from box to box, and one that passes rows; 1 otherwise.
CHAIN, DETOUR = 8, 0.2
TALLEST = 2400  # what is taller waits folded
SMALLEST = 0.62  # of its own size; in a narrower column a picture scrolls
COLUMN = 630  # what fits beside another on the page; wider ones stand one below the other

STYLE = """
.across { overflow-x: auto; }
.kinds { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; font-size: .9em; }
.kinds i { display: inline-block; width: 1.6em; height: 1em; margin-right: .45em; vertical-align: -.12em; }
.kinds i { border: 1px solid var(--line); border-radius: 3px; }
"""

Graphs = tuple[TracedGraph, TracedGraph]  # after the trace, after the last pass


class Placed(NamedTuple):
    """A box, or with None a place that an edge passes, by its centre."""

    box: Box | None
    x: float
    y: float
    width: float
    height: float


def show_blocks(before: TracedGraph, after: TracedGraph) -> Html | None:
    """The first block of each kind in both graphs, side by side, as in the report; None if no block repeats."""
    pairs = {prefix: [block_graph(each, prefix) for each in (before, after)] for prefix in repeated_blocks(before)}
    if not pairs:
        return None
    shown = [_before_and_after(prefix, stages) for prefix, stages in pairs.items()]
    legend = _legend({box.kind for stages in pairs.values() for stage in stages for box in stage.boxes})
    return join([legend, tag("p", LEFT_OUT, class_="note"), *shown], "\n")


def _before_and_after(prefix: str, stages: Sequence[BlockGraph]) -> Html:
    name = prefix.rstrip(".")
    layouts = [Layout(stage) for stage in stages]
    width = max(layout.width for layout in layouts)  # one scale for both
    halves = [
        tag("div", tag("h3", title), tag("p", _counts(stage)), tag("div", draw(layout, width), class_="across"))
        for title, stage, layout in zip(("After the trace", "After the passes"), stages, layouts, strict=True)
    ]
    pair = tag("div", *halves, class_="pair" if SMALLEST * width <= COLUMN else "")
    heading = tag("h3", tag("code", name))
    tall = max(layout.height for layout in layouts) > TALLEST
    return join([heading, folded("Show the pictures: they are tall", pair) if tall else pair], "\n")


def _counts(graph: BlockGraph) -> Html:
    fused = f", {graph.fused_rotations} of them fused" if graph.fused_rotations else ""
    rotations = tag("b", count(graph.rotations, "online rotation"))
    return join([rotations, fused, ", ", count(graph.linears, "linear layer"), ", ", count(graph.nodes, "node")])


def _legend(drawn: set[str]) -> Html:
    found = {kind: text for kind, text in KEYS.items() if kind in drawn}
    keys = [tag("span", tag("i", style=f"background:{_fill(kind)}"), text) for kind, text in found.items()]
    return tag("p", *keys, class_="kinds")


def _fill(kind: str) -> str:
    return COLOURS.get(kind, PLAIN)[0]


# ---------------------------------------------------------------------------------------------------------- layout


class Layout:
    """Where the boxes of a graph stand: `placed`, and `courses`, the numbers of the places that each edge visits."""

    def __init__(self, graph: BlockGraph):
        self.boxes: list[Box | None] = list(graph.boxes)
        rows = _rows(len(graph.boxes), graph.edges)
        self.courses = [self._course(rows, start, end) for start, end in graph.edges]
        self.passing = [course[1:-1] for course in self.courses]
        self.rows: list[list[int]] = [[] for _ in range(max(rows, default=-1) + 1)]
        for item, row in enumerate(rows):
            self.rows[row].append(item)
        self.above: list[list[int]] = [[] for _ in rows]
        self.below: list[list[int]] = [[] for _ in rows]
        for course in self.courses:
            for upper, lower in pairwise(course):
                self.below[upper].append(lower)
                self.above[lower].append(upper)
        self._order()
        self.placed = self._place()
        self.width = max((each.x + each.width / 2 for each in self.placed), default=0) + MARGIN
        self.height = max((each.y + each.height / 2 for each in self.placed), default=0) + MARGIN

    def _course(self, rows: list[int], start: int, end: int) -> list[int]:
        """An edge's places, one a row, from box to box; adds those between to the rows."""
        between = range(rows[start] + 1, rows[end])
        passing = [*range(len(rows), len(rows) + len(between))]
        rows += between
        self.boxes += [None] * len(between)
        return [start, *passing, end]

    def _order(self) -> None:
        """Order each row by its neighbours' mean place: of those above on the way down, of those below going up."""
        for sweep in range(SWEEPS):
            neighbours = self.below if sweep % 2 else self.above
            at = {item: place for row in self.rows for place, item in enumerate(row)}
            for row in reversed(self.rows) if sweep % 2 else self.rows:
                near = {item: [at[other] for other in neighbours[item]] or [at[item]] for item in row}
                row.sort(key=lambda item: sum(near[item]) / len(near[item]))
                at |= {item: place for place, item in enumerate(row)}

    def _place(self) -> list[Placed]:
        sizes = [_size(box) for box in self.boxes]
        lines = self._lines()
        x = [0.0] * len(self.boxes)
        for row in self.rows:
            _keep_apart(row, x, [0.0] * len(row), [1.0] * len(row), sizes)
        for sweep in range(2 * SWEEPS):
            straight: dict[int, float] = {}
            for passing, line in zip(self.passing, lines, strict=True):
                if passing:  # first close to the boxes, then straight past the widest of them
                    chosen = line if sweep >= SWEEPS else fmean
                    straight |= dict.fromkeys(passing, chosen([x[item] for item in passing]))
            for row in reversed(self.rows) if sweep % 2 else self.rows:
                wished, weights = zip(*(self._wish(item, x, straight) for item in row), strict=True)
                _keep_apart(row, x, wished, weights, sizes)
        heights = [max(sizes[item][1] for item in row) for row in self.rows]
        bottoms = accumulate((height + ROW_GAP for height in heights), initial=MARGIN - ROW_GAP)
        y = [bottom + ROW_GAP + height / 2 for bottom, height in zip(bottoms, heights, strict=False)]
        row_of = {item: number for number, row in enumerate(self.rows) for item in row}
        left = min((x[item] - sizes[item][0] / 2 for item in row_of), default=0) - MARGIN
        return [
            Placed(box, x[item] - left, y[row_of[item]], sizes[item][0], sizes[item][1] or heights[row_of[item]])
            for item, box in enumerate(self.boxes)
        ]

    def _wish(self, item: int, x: Sequence[float], straight: Mapping[int, float]) -> tuple[float, float]:
        """The place that an item is pulled to, and how hard: a box by its edges, what an edge passes by its course."""
        if item in straight:
            return straight[item], CHAIN
        pulls = [(x[other], self._pull(other, item)) for other in self.above[item]]
        pulls += [(x[other], self._pull(item, other)) for other in self.below[item]]
        total = sum(pull for _, pull in pulls)
        return (sum(place * pull for place, pull in pulls) / total, total) if pulls else (x[item], 1)

    def _lines(self) -> list[Callable[[Sequence[float]], float]]:
        """What makes one of the places each edge passes: the outermost if no box is further out, else the mean."""
        left = {item for row in self.rows for item in takewhile(self._is_passed, row)}
        right = {item for row in self.rows for item in takewhile(self._is_passed, reversed(row))}
        return [
            min if left.issuperset(passing) else max if right.issuperset(passing) else fmean for passing in self.passing
        ]

    def _is_passed(self, item: int) -> bool:
        return self.boxes[item] is None

    def _pull(self, upper: int, lower: int) -> float:
        if self.boxes[upper] is None or self.boxes[lower] is None:
            return DETOUR
        return CHAIN if len(self.below[upper]) == len(self.above[lower]) == 1 else 1


def _rows(boxes: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The row of each box, from 0: below all that it reads, and as low as its readers allow if that shortens edges."""
    above: list[list[int]] = [[] for _ in range(boxes)]
    below: list[list[int]] = [[] for _ in range(boxes)]
    for start, end in edges:
        below[start].append(end)
        above[end].append(start)
    rows = [0] * boxes
    for box in range(boxes):
        rows[box] = max((rows[other] + 1 for other in above[box]), default=0)
    for box in reversed(range(boxes)):
        if below[box] and len(above[box]) <= len(below[box]):
            rows[box] = min(rows[other] for other in below[box]) - 1
    return rows


def _keep_apart(
    row: Sequence[int],
    x: list[float],
    wished: Sequence[float],
    weights: Sequence[float],
    sizes: Sequence[tuple[float, float]],
) -> None:
    """Put a row's items, in their order, where the weighted squares of the distances to their wishes are least.

    Pool adjacent violators: neighbours that would overlap become a group, which stands at the mean wish of its items.
    """
    shifts, reach = [], 0.0  # distance of each item from the row's first if all stood as close as they may
    for before, item in pairwise([None, *row]):
        if before is not None:
            gap = BOX_GAP if sizes[before][1] and sizes[item][1] else BOX_GAP / 2
            reach += (sizes[before][0] + sizes[item][0]) / 2 + gap
        shifts.append(reach)
    groups: list[list[float]] = []  # [place, weight, items]
    for wish, weight, shift in zip(wished, weights, shifts, strict=True):
        groups.append([wish - shift, weight, 1])
        while len(groups) > 1 and groups[-2][0] >= groups[-1][0]:
            (place, heavy, items), (other, light, more) = groups[-2:]
            groups[-2:] = [[(place * heavy + other * light) / (heavy + light), heavy + light, items + more]]
    places = [place for place, _, items in groups for _ in range(int(items))]
    for item, place, shift in zip(row, places, shifts, strict=True):
        x[item] = place + shift


def _size(box: Box | None) -> tuple[float, float]:
    """(width, height); a place that an edge passes has no height of its own."""
    if box is None:
        return LANE, 0
    title, detail = (len(_short(text)) * ADVANCE for text in (box.title, box.detail))
    width = max(title * FONT, detail * SMALL_FONT) + 2 * PADDING
    return round(width, 1), 36 if box.detail else 22


def _short(text: str) -> str:
    """The text, its middle left out if it is too long: module paths tell by their ends."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]}…{text[-half:]}"


# --------------------------------------------------------------------------------------------------------- drawing


def draw(layout: Layout, width: float) -> Html:
    """An <svg> element `width` pixels wide at full size, the graph in its middle."""
    edges = [_edge([layout.placed[item] for item in course]) for course in layout.courses]
    boxes = [_box(each) for each in layout.placed if each.box is not None]
    lines = tag("g", *edges, **{"fill": "none", "stroke": SOFT, "stroke-width": "1.1"})
    texts = tag("g", join(boxes, "\n"), **{"text-anchor": "middle", "font-size": FONT})
    view = f"{(layout.width - width) / 2:.0f} 0 {width:.0f} {layout.height:.0f}"
    size = f"min-width:{SMALLEST * width:.0f}px;max-width:{width:.0f}px"
    return tag("svg", lines, "\n", texts, viewBox=view, role="img", style=size)


def _edge(visited: Sequence[Placed]) -> Html:
    """A curve that leaves and enters every row upright, with a tip where it ends."""
    first, last = visited[0], visited[-1]
    path = f"M{first.x:.1f} {first.y + first.height / 2:.1f}"
    for upper, lower in pairwise(visited):
        start, end = upper.y + upper.height / 2, lower.y - lower.height / 2
        middle = (start + end) / 2
        path += f"C{upper.x:.1f} {middle:.1f} {lower.x:.1f} {middle:.1f} {lower.x:.1f} {end:.1f}"
        path += f"V{lower.y + lower.height / 2:.1f}" if lower.box is None else ""
    return tag("path", d=f"{path}m-3 -5l3 5l3 -5" if last.box is not None else path)


def _box(placed: Placed) -> Html:
    box, (fill, ink) = placed.box, COLOURS.get(placed.box.kind, PLAIN)
    left, top = placed.x - placed.width / 2, placed.y - placed.height / 2
    at_edge = box.kind in (INPUT, OUTPUT)
    outline: dict[str, Any] = {"fill": fill, "stroke": LINE if fill == PLAIN[0] else fill}
    if at_edge:
        outline |= {"fill": "none", "stroke": SOFT, "stroke-dasharray": "4 3"}
    radius = placed.height / 2 if at_edge else 4
    shape = tag(
        "rect", x=f"{left:.1f}", y=f"{top:.1f}", width=placed.width, height=placed.height, rx=radius, **outline
    )  # fmt: skip
    title = _text(placed, box.title, 0 if not box.detail else -7, ink)
    detail = [_text(placed, box.detail, 9, ink, **{"font-size": SMALL_FONT})] if box.detail else []
    return tag("g", shape, title, *detail, class_=box.kind)


def _text(placed: Placed, text: str, down: float, ink: str, **style: Any) -> Html:
    whole = [tag("title", text)] if _short(text) != text else []
    return tag("text", *whole, _short(text), x=f"{placed.x:.1f}", y=f"{placed.y + down + 4:.1f}", fill=ink, **style)
