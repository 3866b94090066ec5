"""The frame that offline pages share: style sheet, links to the parts, and each part under its title.

One file without scripts, right on light, on dark and on paper. Equal parts give equal bytes.
"""

import html
from collections.abc import Sequence
from typing import NamedTuple

from lrq_export.verify.markup import Html, join, tag


class Part(NamedTuple):
    """One part of a page, linked from its top."""

    anchor: str
    title: str
    line: str  # what it shows and what is good
    content: Html


def render_page(title: str, header: Html, parts: Sequence[Part], style: str = "") -> str:
    """The page as text; `style` is CSS that this page needs beyond what all share."""
    links = join((tag("a", part.title, href=f"#{part.anchor}") for part in parts), " ")
    body = join([header, tag("nav", links), *map(render_part, parts)], "\n")
    return PAGE.format(title=html.escape(title), style=STYLE_SHEET + style, body=body)


def render_part(part: Part) -> Html:
    line = tag("p", part.line, class_="line")
    return tag("section", tag("h2", part.title), line, part.content, id=part.anchor)


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
.ladder td:nth-child(3) { min-width: 12rem; }
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
