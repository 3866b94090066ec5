"""The report page of a real package: every figure of its report.json, read back from the page."""

import copy
import html
import json
import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from lrq_export.checkpoint import TensorFile
from lrq_export.recipe import load_recipe
from lrq_export.verify.report_engines import show_added_engines
from lrq_export.verify.report_page import render_report_page


def _text(page):
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def _section(page, anchor):
    return re.search(rf'<section id="{anchor}">.*?</section>', page, flags=re.DOTALL)[0]


@pytest.fixture(scope="module")
def real(package):
    return json.loads((package / "report.json").read_text())


@pytest.fixture(scope="module")
def real_page(package):
    return (package / "report.html").read_text()


def _pixels(address):
    """What a data URL shows, as red, green and blue from 0 to 1."""
    return imread(BytesIO(b64decode(address.partition(",")[2])))[..., :3]


def _tables(page, anchor):
    """Every row of a section's tables, as the text of its cells by their heads."""
    rows = []
    for table in re.findall(r"<table.*?</table>", _section(page, anchor), flags=re.DOTALL):
        heads = [_text(head) for head in re.findall(r"<th [^>]*>(.*?)</th>", table)]
        for row in re.findall(r"<tr><td.*?</tr>", table, flags=re.DOTALL):
            cells = re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL)
            rows.append(dict(zip(heads, map(_text, cells), strict=True)))
    return rows


def _left_out(wanted, rows):
    """Which of the wanted rows, by number, no row of the page shows; figures are compared as numbers."""

    def shows(row, key, value):
        return key in row and (float(row[key]) if isinstance(value, float) else row[key]) == value

    return [
        number
        for number, each in enumerate(wanted)
        if not any(all(shows(row, key, value) for key, value in each.items()) for row in rows)
    ]


def _missing_rungs(page, report):
    def figure(rung, key):
        value, decibels = rung[key], rung["metric"] == "PSNR dB"
        if value is None:
            return "–"
        sign = "" if key == "value" else "≥ " if decibels else "≤ "
        return sign + (f"{value:.2f} dB" if decibels else re.sub(r"e-0?", "e-", f"{value:.1e}"))

    wanted = [
        {
            "Result": {True: "✓ pass", False: "✗ FAIL", None: "○ no bound"}[rung["passed"]],
            "Rung": rung["rung"],
            "What is compared": rung["title"] + rung["note"],
            "A failure blames": rung["blames"],
            "Metric": rung["metric"],
            "Value": figure(rung, "value"),
            "Bound": figure(rung, "bound"),
        }
        for rung in report["ladder"]
    ]
    return _left_out(wanted, _tables(page, "ladder"))


def _missing_layers(page, report):
    reasons = re.findall(r"<li>(.*?)<span", _section(page, "layers"))  # shared ones stand as [1], [2], ... in the rows
    rows = _tables(page, "layers")
    for row in rows:
        why = row["Rotated by, and why"]
        row["Rotated by, and why"] = re.sub(r"\[(\d+)\]$", lambda found: html.unescape(reasons[int(found[1]) - 1]), why)
    wanted = [
        {
            "Layer": layer["layer"],
            "Shape": f"{layer['rows']}×{layer['cols']}",
            "Bits": f"{layer['bits']}/{layer['act_bits']}",
            "Group": "row" if layer["group_size"] == layer["cols"] else str(layer["group_size"]),
            "Block": str(layer["block"]),
            "Rotated by, and why": f"{layer['rotated_by']} {layer['reason']}",
            "Weight NMSE": float(f"{layer['weight_nmse']:.1e}"),
            "Weighted": float(f"{layer['weighted_nmse']:.1e}"),
            "Output NMSE": float(f"{layer['output_nmse']:.1e}"),
            "J": float(f"{layer['rms']:.3g}"),
            "Kurtosis": float(f"{layer['kurtosis']:.3g}"),
            "Peak/RMS": float(f"{layer['peak_to_rms']:.3g}"),
            "of fp16": float(f"{layer['bytes'] / layer['bytes_fp16']:.3f}"),
        }
        for layer in report["layers"]
    ]
    return _left_out(wanted, rows)


def _missing_histograms(page, report):
    """Those without a picture whose outline has the counts' heights and whose ticks stand at the levels."""
    pictures = re.findall(
        r"<h3><code>(.*?)</code></h3>(<svg.*?</svg>)(.*?)</p>", _section(page, "histograms"), re.DOTALL
    )
    drawn = {name: (svg, _text(caption)) for name, svg, caption in pictures}
    missing = []
    for number, entry in enumerate(report["histograms"]):
        svg, caption = drawn.get(entry["layer"], ("", ""))
        outline = re.search(r'd="([^"]*)"[^>]*fill: var\(--accent\)', svg)
        if outline is None:
            missing.append(number)
            continue
        points = np.array(re.findall(r"[ML] (\S+) (\S+)", outline[1]), float)
        base, (lefts, tops) = points[0, 1], points[1:-1:2].T
        counts, levels = np.array(entry["counts"]), entry["levels"]
        ticks = np.array(re.findall(r'd="M (\S+) [^"]*"[^>]*stroke: var\(--mark\)', svg), float)
        places = np.interp(levels, entry["edges"][:-1], lefts)
        shown = (
            np.allclose((base - tops) / (base - tops).max(), counts / counts.max(), atol=1e-3)
            and np.allclose(ticks, [*places, *places], atol=0.01)  # a faint line through the outline, a tick below
            and " ".join(f"{round(level, 1):g}" for level in levels) in caption
            and f"{counts.sum():,} weights" in caption
        )
        missing += [] if shown else [number]
    return missing


def _missing_errors(key, heads):
    def missing(page, report):
        wanted = [
            {"NMSE": float(f"{point['nmse']:.1e}")} | {head: float(point[name]) for head, name in heads.items()}
            for point in report[key]
        ]
        rows = [row for row in _tables(page, "errors") if row.keys() == {"NMSE", *heads}]
        return _left_out(wanted, rows)

    return missing


def _missing_timings(page, report):
    wanted = [{"Stage": each["stage"], "Seconds": float(f"{each['seconds']:.2f}")} for each in report["timings"]]
    return _left_out(wanted, _tables(page, "timings"))


def _missing_passes(page, report):
    wanted = [{"Pass": each["name"], "Fired": str(each["fired"])} for each in report["passes"]]
    for row, each in zip(wanted, report["passes"], strict=True):
        if each["nmse"] is not None:  # a pass that did not fire has nothing to prove
            row["NMSE against before"] = float(f"{each['nmse']:.1e}")
    return _left_out(wanted, _tables(page, "passes"))


# Lists of report.json: which of their entries a page lacks.
LISTS = {
    "ladder": _missing_rungs,
    "layers": _missing_layers,
    "histograms": _missing_histograms,
    "noise_error_by_timestep": _missing_errors("noise_error_by_timestep", {"Timestep": "timestep"}),
    "trajectory": _missing_errors("trajectory", {"Step": "step", "Timestep": "timestep"}),
    "passes": _missing_passes,
    "timings": _missing_timings,
}


@pytest.mark.parametrize("key", LISTS)
def test_the_page_of_a_package_shows_every_entry(key, real, real_page):
    assert len(real[key]) >= 3
    assert LISTS[key](real_page, real) == []


@pytest.mark.parametrize("key", LISTS)
def test_an_entry_left_out_is_noticed(key, real):
    shortened = {**real, key: real[key][:1] + real[key][2:]}
    assert LISTS[key](render_report_page(shortened, None), real) == [1]


CHANGED = ("bits", "rotated_by", "reason", "weight_nmse", "output_nmse", "rms", "kurtosis", "bytes")


@pytest.mark.parametrize("key", CHANGED)
def test_another_figure_of_a_layer_is_noticed(key, real):
    other = copy.deepcopy(real)
    value = other["layers"][4][key]
    other["layers"][4][key] = f"not {value}" if isinstance(value, str) else value * 2
    assert _missing_layers(render_report_page(other, None), real) == [4]


def test_the_layers_of_the_page_are_those_that_the_package_holds(package, real):
    manifest = json.loads((package / "manifest.json").read_text())
    assert [layer["layer"] for layer in real["layers"]] == list(manifest["layers"])
    assert {len(entry["levels"]) for entry in real["histograms"]} == {2 ** manifest["recipe"]["weights"]["bits"]}


def test_the_page_of_a_package_shows_a_block_before_and_after_the_passes(real_page):
    section = _section(real_page, "blocks")
    assert section.count("<svg") == 2
    before, after = re.findall(r"(\d+) online rotations", section)
    assert int(before) > int(after)


def test_the_page_of_a_package_shows_its_sizes(package, real, real_page):
    sizes = real["sizes"]
    shown = {row["What"]: row["Bytes"] for row in _tables(real_page, "sizes")}
    assert shown == {
        "source, all weights as fp16": f"{sizes['source_fp16_bytes']:,}",
        "model.onnx with its data": f"{(package / 'model.onnx').stat().st_size:,}",
        "of it: quantized weights, packed": f"{sum(layer['bytes'] for layer in real['layers']):,}",
        "of it: kept in floating point": f"{sizes['kept_float_bytes']:,}",
        "engine": f"{sum(file.stat().st_size for file in (package / 'engine/onnxruntime').iterdir()):,}",
    }
    assert f"in fp16: {sizes['packed_ratio']:.3f}" in _text(_section(real_page, "sizes"))


def test_the_page_of_a_package_shows_its_samples_side_by_side(package, real, real_page):
    section = _section(real_page, "samples")
    figures = re.findall(r"<figure>.*?</figure>", section, flags=re.DOTALL)
    originals = TensorFile(package / "reference.safetensors").read("latents")[-1].numpy()
    assert len(figures) == len(originals) == len(real["images"]["psnr_db"]) == 2
    for figure, original, decibels in zip(figures, originals, real["images"]["psnr_db"], strict=True):
        addresses = dict(reversed(pair) for pair in re.findall(r'src="([^"]*)" alt="([^"]*)"', figure))
        assert list(addresses)[:2] == ["floating point", "quantized"]
        float_, quantized, difference = (_pixels(address) for address in addresses.values())
        np.testing.assert_allclose(float_.mean(-1), (original[0].clip(-1, 1) + 1) / 2, atol=1 / 255)
        assert quantized.shape == difference.shape == float_.shape
        assert not np.array_equal(quantized, float_)
        assert f"{decibels:.2f} dB" in _text(figure)
    assert f"{real['images']['psnr_total_db']:.2f} dB over all pixels" in _text(section)


def test_an_engine_is_told_of_where_the_page_has_room_for_it(package, copy_of, real_page):
    """A page from before there was a section on engines, or with none that ends, keeps the rest as it is."""
    folder = copy_of(package)
    recipe = load_recipe(overrides={"engine.targets": '["tensorrt-rtx"]'})
    older = real_page.replace(_section(real_page, "engines"), "")
    (folder / "report.html").write_text(older)
    show_added_engines(folder, recipe)
    page = (folder / "report.html").read_text()
    assert page.replace(_section(page, "origin"), "") == older.replace(_section(older, "origin"), "")
    assert "tensorrt-rtx" in _section(page, "origin")
    assert json.loads((folder / "report.json").read_text())["recipe"]["engine"]["targets"] == ["tensorrt-rtx"]
    (folder / "report.html").write_text('<section id="engines">')
    show_added_engines(folder, recipe)
    assert (folder / "report.html").read_text() == '<section id="engines">'
