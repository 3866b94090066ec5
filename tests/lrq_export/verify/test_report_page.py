"""The report page of made-up reports, in which everything can be varied."""

import copy
import html
import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from lrq_export.verify import plots
from lrq_export.verify.markup import byte_size, digits, scientific
from lrq_export.verify.plots import gauge
from lrq_export.verify.report_page import render_report_page, write_report_page
from lrq_export.verify.report_sections import SECTIONS

HOSTILE = "\"><script>alert('x')</script>&amp;{braces}%s"


def _rung(rung, value, bound=1e-6, passed=True, metric="NMSE"):
    return {
        "rung": rung, "title": f"title of {rung}", "blames": f"blame of {rung}", "metric": metric, "value": value,
        "bound": bound, "passed": passed, "note": f"note of {rung}",
    }  # fmt: skip


def _layer(index):
    return {
        "layer": f"blocks.{index}.ff", "rows": 1152, "cols": 288 + index, "bits": 4, "act_bits": 8, "group_size": 0,
        "block": 72, "equalized": index == 2, "rotated_by": "HadamardRotate",
        "reason": "shared reason" if index else "own reason",
        "weight_nmse": 5.1e-3, "weighted_nmse": 4.2e-3, "output_nmse": 1.3e-3 * (index + 1), "rms": 1.25,
        "kurtosis": 31.5, "peak_to_rms": 12.75, "bytes": 170_000 + index, "bytes_fp16": 663_552,
    }  # fmt: skip


def _report(layers=3):
    return {
        "schema": 1,
        "tool": {"name": "lrq-export", "version": "0.1.0", "libraries": {"torch": "2.13.7", "onnx": "1.20.9"}},
        "machine": {"processor": "Xeon 8488C", "cores": 2, "features": ["avx2", "amx_int8"]},
        "source": {"class_name": "PixArt", "path_name": "digits", "fingerprint": "9f31ab", "parameters": 610_856_096},
        "recipe": {"weights": {"bits": 4}, "keep": ["pos_embed*", "proj_out"], "gates": {"psnr_db": None}},
        "warnings": ["no calibration was given"],
        "ladder": [
            _rung("R0", 0.0),
            _rung("R1", 3.4e-4, None, None),
            _rung("R2", 2.1e-12),
            _rung("R3", 4.3e-13),
            _rung("R4", 3.9e-9),
            _rung("R5", 35.21, 33.5, True, "PSNR dB"),
        ],
        "passes": [
            {"name": "share_rotation", "fired": 56, "nmse": 1.7e-14, "skipped": []},
            {"name": "fold", "fired": 7, "nmse": None, "skipped": [
                {"node": "/a/MatMul", "reason": "two readers"}, {"node": "/b/MatMul", "reason": "two readers"},
            ]},
        ],
        "layers": [_layer(index) for index in range(layers)],
        "histograms": [
            {"layer": "blocks.0.ff", "edges": [-140.0, -70.0, 0.0, 70.0, 140.0], "counts": [1, 40, 39, 20],
             "levels": [-90.0, -31.0, 0.0, 33.0, 104.0]},
        ],
        "noise_error_by_timestep": [{"timestep": 25, "nmse": 4.6e-4}, {"timestep": 975, "nmse": 1.8e-4}],
        "trajectory": [{"step": 1, "timestep": 951, "nmse": 2.2e-5}, {"step": 2, "timestep": 901, "nmse": 2.7e-5}],
        "images": {"psnr_db": [34.56, 36.78], "psnr_total_db": 35.44, "labels": ["digit 3", "digit 8"]},
        "sizes": {
            "source_fp16_bytes": 1_221_712_192, "packed_bytes": 283_115_520, "kept_float_bytes": 60_211_200,
            "model_bytes": 344_326_720, "engine_bytes": None, "packed_ratio": 0.252,
        },
        "engines": [
            {"target": "onnxruntime", "built": True, "bytes": 640_000_000, "bits_per_weight": 8.382},
            {"target": "tensorrt", "built": False, "bytes": None, "bits_per_weight": None},
            {"target": "tensorrt-rtx", "built": True, "bytes": 350_000_000, "bits_per_weight": 4.584, "plugins": True,
             "plugin_layers": 417, "layers": 2345, "profiles": [{"samples": [1, 2, 8], "text": [77, 77, 77]}],
             "version": "1.7.1.116"},
        ],
        "timings": [{"stage": "quantize", "seconds": 301.55}, {"stage": "verify", "seconds": 96.4}],
        "peak_memory_bytes": 3_912_000_000,
    }  # fmt: skip


# What each section must show of that report, as text.
SHOWN = {
    "warnings": ["no calibration was given"],
    "samples": ["34.56 dB", "36.78 dB", "35.44 dB", "digit 3", "digit 8", "worst"],
    "errors": ["4.6e-4", "1.8e-4", "975", "2.2e-5", "2.7e-5", "951"],
    "layers": ["blocks.2.ff", "1152×290", "4/8", "72 eq.", "5.1e-3", "4.2e-3", "3.9e-3", "1.25", "31.5", "12.8",
               "170 kB", "0.256", "own reason", "shared reason", "2 layers", "HadamardRotate", "row"],
    "histograms": ["blocks.0.ff", "-90 -31 0 33 104", "5 levels", "100 weights", "21 %"],
    "passes": ["share_rotation", "56", "1.7e-14", "–", "two readers: /a/MatMul, /b/MatMul", "2 nodes, 1 reason"],
    "blocks": ["No graphs were handed to this page"],  # test_graph_picture hands it some
    "sizes": ["1.22 GB", "283,115,520", "60.2 MB", "0.282", "–", "0.252"],
    "engines": ["onnxruntime", "640 MB", "8.38", "network only", "417 layers", "2,345", "samples 1–8 text 77",
                "1.7.1.116"],
    "timings": ["quantize", "301.55", "96.40", "398.0 s", "3.91 GB"],
    "origin": ["weights.bits", "pos_embed*, proj_out", "9f31ab", "2.13.7", "amx_int8"],
}  # fmt: skip


def _samples(channels=1, side=8, count=2):
    random = np.random.default_rng(0)
    image = random.uniform(-1, 1, (count, channels, side, side)).astype(np.float32)
    return {"float": image, "quantized": (image + 0.02 * random.standard_normal(image.shape)).astype(np.float32)}


def _text(page):
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


def _section(page, anchor):
    return re.search(rf'<section id="{anchor}">.*?</section>', page, flags=re.DOTALL)[0]


def _missing_rungs(page, report):
    """The rungs of `report` that the page's ladder does not show whole: mark, names, value and bound."""
    rows = re.findall(r"<tr>.*?</tr>", _section(page, "ladder"), flags=re.DOTALL)
    missing = []
    for rung in report["ladder"]:
        unit = " dB" if rung["metric"] == "PSNR dB" else ""
        value, bound = (
            digits(rung[key], ".2f", unit) if unit else scientific(rung[key]) for key in ("value", "bound")
        )  # fmt: skip
        mark = {True: "✓ pass", False: "✗ FAIL", None: "○ no bound"}[rung["passed"]]
        wanted = [mark, rung["rung"], rung["title"], rung["blames"], rung["note"], value, bound]
        if not any(all(piece in _text(row) for piece in wanted) for row in rows):
            missing.append(rung["rung"])
    return missing


def _hostile(value):
    """The same report with markup in every text, keys of free tables included."""
    if isinstance(value, dict):
        return {key: _hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) and value not in {"NMSE", "PSNR dB"} else value


@pytest.fixture(scope="module")
def page():
    return render_report_page(_report(), _samples())


def test_every_rung_is_shown(page):
    assert _missing_rungs(page, _report()) == []


@pytest.mark.parametrize("rung", range(6))
def test_a_rung_left_out_is_noticed(rung):
    report = _report()
    shortened = {**report, "ladder": report["ladder"][:rung] + report["ladder"][rung + 1 :]}
    page = render_report_page(shortened, None)
    assert _missing_rungs(page, report) == [f"R{rung}"]
    assert f"R{rung} not run" in _text(page)


@pytest.mark.parametrize("anchor", SHOWN)
def test_each_section_shows_its_numbers(page, anchor):
    text = _text(_section(page, anchor))
    assert [piece for piece in SHOWN[anchor] if piece not in text] == []


def test_every_section_is_tested_and_linked(page):
    assert {section.anchor for section in SECTIONS} == {"ladder", *SHOWN}
    assert all(f'href="#{section.anchor}"' in page for section in SECTIONS)
    assert all(html.escape(section.line) in page for section in SECTIONS)


def test_nothing_is_fetched(page, fetched_by):
    assert fetched_by(page) == []


@pytest.mark.parametrize("reference", ['<a href="x.html">', "<img src='//cdn/x.png'>", "url(http://x)", "@import 'x'"])
def test_the_search_for_addresses_finds(reference, fetched_by):
    assert fetched_by(reference)


def test_the_page_is_well_formed(page, structure_of):
    structure = structure_of(page)
    assert len(structure.ids) == len(set(structure.ids))
    assert set(structure.references) <= set(structure.ids)


def test_text_of_the_report_stays_text(page, structure_of):
    report = _hostile(_report())
    report["recipe"][HOSTILE] = report["tool"]["libraries"][HOSTILE] = HOSTILE
    hostile = render_report_page(report, _samples())
    assert "<script" not in hostile
    assert structure_of(hostile).names == structure_of(page).names
    assert f"blocks.2.ff{HOSTILE}" in _text(hostile)


def test_equal_inputs_give_equal_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        write_report_page(tmp_path / name, copy.deepcopy(_report()), _samples())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_errors_that_are_not_finite_are_listed_but_not_drawn():
    report = {**_report(), "noise_error_by_timestep": [{"timestep": 25.0, "nmse": float("inf")}]}
    section = _section(render_report_page(report, None), "errors")
    assert "Largest ∞ at timestep 25." in _text(section)
    assert section.count("<svg") == 1


def test_ticks_of_errors_that_hardly_differ_are_told_apart():
    picture = plots.curve("curve", [1, 2, 3], [1.05e-2, 1.18e-2, 1.17e-2], "step", "NMSE")
    ticks = re.findall(r">([^<]*e-2)</text>", picture)
    assert len(set(ticks)) == len(ticks) > 2


def test_layers_are_counted_in_whole_numbers():
    ticks = re.findall(r">([\d.]+)</text>", plots.dots("dots", [1e-3, 2e-3, 3e-3], [], "layer", "output NMSE"))
    assert "2" in ticks
    assert not any("." in tick for tick in ticks)


@pytest.mark.parametrize("key", [*_report(), None])
@pytest.mark.parametrize("emptied", ["missing", "empty", "none"])
def test_a_report_without_a_part_still_renders(key, emptied, structure_of):
    report = _report()
    for name in report if key is None else [key]:
        report = {**report, name: None if emptied == "none" else type(report[name])()}
    if emptied == "missing":
        report = {name: value for name, value in report.items() if value}
    page = render_report_page(report, None)
    assert structure_of(page).names >= {"section"}
    assert "None<" not in page


def test_values_of_none_are_dashes():
    def emptied(rows, kept):
        return [{key: value if key in kept else None for key, value in row.items()} for row in rows]

    report = _report()
    report["layers"] = emptied(report["layers"], {"layer"})
    report["trajectory"] = emptied(report["trajectory"], {"step"})
    report["timings"] = emptied(report["timings"], {"stage"})
    report["images"]["psnr_db"] = [None, 36.78]
    page = render_report_page(report, _samples())
    assert "None" not in _text(page).replace("None.", "")
    assert _section(page, "layers").count("–") >= 3 * 13


def test_the_verdict_names_the_first_rung_that_broke():
    report = _report()
    report["ladder"][3] |= {"value": 4e-5, "passed": False}
    report["ladder"][5] |= {"value": 12.0, "passed": False}
    page = render_report_page(report, None)
    verdict = _text(re.search(r'<p class="verdict fail">.*?</p>', page)[0])
    assert "R3 (title of R3) failed: NMSE 4.0e-5, bound 1.0e-6; look at blame of R3; 1 later rung failed too" in verdict
    assert _missing_rungs(page, report) == []


def test_the_verdict_says_what_was_not_checked(page):
    verdict = _text(re.search(r'<p class="verdict pass">.*?</p>', page)[0])
    assert "5 checked rungs passed" in verdict
    assert "R1 reported without a bound" in verdict
    assert "0.252" in verdict
    assert "35.44 dB" in verdict
    every = _report()
    every["ladder"][1] |= {"bound": 5e-4, "passed": True}
    assert "All rungs passed" in _text(render_report_page(every, None))
    assert "Nothing was checked" in _text(render_report_page({}, None))


def test_the_gauge_puts_decibels_beside_errors():
    assert "left:75.0%" in gauge("NMSE", 1e-4, None, "open")
    assert "left:75.0%" in gauge("PSNR dB", 40.0, None, "open")
    assert "left:0.0%" in gauge("NMSE", 0.0, None, "pass")
    assert "left:100.0%" in gauge("NMSE", float("inf"), 1e-6, "fail")
    assert "width:62.5%" in gauge("NMSE", float("nan"), 1e-6, "fail")


@pytest.mark.parametrize(
    ("channels", "side", "said"),
    [
        (1, 8, "8×8"),
        (3, 8, "8×8"),
        (4, 8, "the first 3 of 4 channels"),
        (2, 8, "the first 2 of 2"),
        (3, 600, "Averaged"),
    ],
)
def test_the_samples_say_how_they_are_shown(channels, side, said):
    section = _section(render_report_page(_report(), _samples(channels, side)), "samples")
    assert said in _text(section)
    assert ("False colour" in section) == (channels not in (1, 3))
    assert section.count("data:image/png;base64,") == 2 * 3


def test_more_samples_than_fit_are_counted():
    report = {**_report(), "images": None}
    section = _section(render_report_page(report, _samples(count=30)), "samples")
    assert section.count("<figure>") == 24
    assert "The first 24 of 30" in section


def test_the_difference_is_amplified_as_far_as_it_fits():
    assert plots.amplification(np.full((1, 1, 4, 4), 0.09)) == 20
    assert plots.amplification(np.full((1, 1, 4, 4), 2.0)) == 1
    assert plots.amplification(np.full((1, 1, 4, 4), np.nan)) == plots.amplification(np.zeros((1, 1, 4, 4))) == 1000


def _pixels(address):
    """What a data URL shows, as red, green and blue from 0 to 1."""
    return imread(BytesIO(b64decode(address.partition(",")[2])))[..., :3]


def test_a_png_holds_the_image():
    image = np.array([[[-1.0, 1.0], [0.0, np.nan]]])
    pixels = _pixels(plots.png(image))
    np.testing.assert_allclose(pixels.mean(-1), [[0, 1], [128 / 255, 0]], atol=1e-6)


def test_five_hundred_layers_are_all_listed():
    section = _section(render_report_page(_report(layers=500), None), "layers")
    assert section.count("<tr>") == 501
    assert section.count("shared reason") == 1  # once in the list above, by number in the rows


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0, "0"), (3.24e-12, "3.2e-12"), (1.0, "1.0e0"), (25.0, "2.5e1"), (None, "–"),
     (float("inf"), "∞"), (float("nan"), "NaN")],
)  # fmt: skip
def test_errors_are_written_short(value, text):
    assert scientific(value) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_700, "1 MB"), (1_221_712_192, "1.22 GB"), (None, "–")],
)
def test_sizes_have_three_digits(size, text):
    assert byte_size(size) == text


def test_the_page_of_a_real_package_is_well_formed_and_fetches_nothing(package, structure_of, fetched_by):
    page = (package / "report.html").read_text()
    assert fetched_by(page) == []
    structure = structure_of(page)
    assert len(structure.ids) == len(set(structure.ids))
    assert set(structure.references) <= set(structure.ids)
    assert "None" not in _text(page).replace("None.", "")
