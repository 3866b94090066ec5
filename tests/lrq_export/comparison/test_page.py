"""The comparison page of made-up reports."""

import copy
import html
import json
import math
import re

import pytest

from lrq_export.comparison.page import HEADS, render_comparison_page, write_comparison_page
from lrq_export.comparison.plots import noise_bars, psnr_against_size, psnr_bars, spread
from lrq_export.comparison.ranking import finite, ranked, rows_at, verdict

HOSTILE = "\"><script>alert('x')</script>&amp;{braces}%s$\\frac$"


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


def section(page, anchor):
    return re.search(rf'<section id="{anchor}">.*?</section>', page, flags=re.DOTALL)[0]


def cells(page, anchor):
    """The first table of a section as rows of texts, its head first."""
    table = re.search(r"<table.*?</table>", section(page, anchor), flags=re.DOTALL)[0]
    rows = re.findall(r"<tr>.*?</tr>", table, flags=re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_each_setting_ranks_its_methods_with_every_figure(report):
    page = render_comparison_page(report)
    head, first, second, third, reference = cells(page, "w4a8")
    assert head == list(HEADS)
    assert first == ["1", "title of tlq", "50.50", "49.87 51.13", "4.2e-4", "1.234", "95.3%", "4.28", "12.3", "✓ yes",
                     "note of tlq"]  # fmt: skip
    assert second[:3] == ["2", "title of rtn", "41.25"]
    assert second[-2:] == ["no: its levels are floats", "note of rtn"]
    assert third[:3] == ["3", "title of broken", "12.00"]
    assert (reference[1], reference[6]) == ("floating point", "98.5%")


def test_what_could_not_be_measured_comes_last_and_is_a_dash(report):
    rows = cells(render_comparison_page(report), "w3a6")[1:-1]
    assert [row[1] for row in rows] == ["title of rtn", "title of tlq", "title of broken"]
    assert rows[-1][2:7] == ["–", "– –", "∞", "–", "–"]


def test_ours_are_marked(report):
    table = section(render_comparison_page(report), "w4a8")
    assert re.findall(r'<b class="method ours">(.*?)</b>', table) == ["title of tlq"]
    assert re.findall(r'<b class="method">(.*?)</b>', table) == ["title of rtn", "title of broken"]


def test_the_head_says_what_was_compared_and_who_wins(report):
    header = text_of(re.search(r"<header>.*?</header>", render_comparison_page(report), flags=re.DOTALL)[0])
    wanted = ["PixArt", "digits", "3 methods", "40 images of seeds 5, 7", "20 steps of DDIMScheduler", "64 inputs",
              "Xeon 8488C, 2 cores"]  # fmt: skip
    assert [piece for piece in wanted if piece not in header] == []
    assert "At W4A8 “title of tlq” wins with 50.50 dB" in header
    assert "At W3A6 “title of rtn” wins with 33.00 dB" in header


def test_inputs_and_chosen_transforms_are_listed_under_a_fold(report):
    page = render_comparison_page(report)
    head, first, second = cells(page, "inputs")
    assert head == ["Input of", "Layers", "Width", "J", "Kurtosis", "Peak", "Peak/RMS"]
    assert first == ["blocks.0.to_q", "2", "288", "1.02", "31.5", "25.5", "25.0"]
    assert second == ["blocks.0.ff", "1", "1152", "0.250", "3.10", "1.00", "4.00"]
    transforms = section(page, "transforms")
    assert re.findall(r"<summary>(.*?)</summary>", transforms) == ["title of tlq", "title of tlq"]
    assert cells(page, "transforms")[1:] == [
        ["blocks.0.to_q", "head Hadamard: output error 3.1e-4"], ["blocks.0.ff", "none: output error 2.2e-3"]
    ]  # fmt: skip
    alike = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", transforms)
    assert alike[:2] == [("title of rtn", "none"), ("title of broken", "full Hadamard")]


def test_methods_that_chose_alike_share_a_fold(report):
    twin = report["rows"][0] | {"method": "codebook", "title": "title of codebook"}
    page = render_comparison_page(report | {"rows": [*report["rows"], twin]})
    assert "<summary>title of tlq, title of codebook</summary>" in section(page, "transforms")


def test_warnings_have_a_section_only_if_there_are_any(report):
    assert "<li>no calibration was given</li>" in section(render_comparison_page(report), "warnings")
    assert 'id="warnings"' not in render_comparison_page(report | {"warnings": []})


def test_the_page_is_well_formed_and_fetches_nothing(report, structure_of, fetched_by):
    page = render_comparison_page(report)
    structure = structure_of(page)
    assert fetched_by(page) == []
    assert len(structure.ids) == len(set(structure.ids))
    assert set(structure.references) <= set(structure.ids)
    assert page.count("<svg") == 2 * 2 + 2  # two pictures a setting, one for each width of activations
    assert "None" not in text_of(page).replace("None.", "")


def test_text_of_the_report_stays_text(report, structure_of):
    def hostile(value):
        if isinstance(value, dict):
            return {key: hostile(item) for key, item in value.items()}
        if isinstance(value, list):
            return [hostile(item) for item in value]
        return value + HOSTILE if isinstance(value, str) else value

    page = render_comparison_page(hostile(report))
    assert "<script" not in page
    assert structure_of(page).names == structure_of(render_comparison_page(report)).names
    pictures = "".join(re.findall(r"<svg.*?</svg>", section(page, "w4a8"), flags=re.DOTALL))
    assert text_of(pictures).count(f"title of tlq{HOSTILE}") == 2  # dollar signs start no formula


def test_equal_reports_give_equal_bytes(report, tmp_path):
    for name in ("a", "b"):
        written = write_comparison_page(tmp_path / f"{name}.html", copy.deepcopy(report))
        assert written == tmp_path / f"{name}.json"
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_the_report_as_json_shows_as_the_report_does(report, tmp_path):
    """JSON has neither NaN nor infinity."""
    report["rows"][0] |= {"psnr_db": math.inf, "psnr_db_by_seed": [math.inf, 51.0], "noise_nmse": 0.0}
    data = json.loads(write_comparison_page(tmp_path / "page.html", report).read_text())
    equal, broken = data["rows"][0], data["rows"][-1]
    assert (equal["psnr_db"], equal["psnr_db_by_seed"]) == (999.0, [999.0, 51.0])
    assert (broken["psnr_db"], broken["psnr_db_by_seed"], broken["noise_nmse"]) == (None, [None, None], None)
    first = cells(render_comparison_page(data), "w4a8")[1]
    assert first[1:5] == ["title of tlq", "∞", "∞ 51.00", "0"]
    assert cells(render_comparison_page(report), "w4a8") == cells(render_comparison_page(data), "w4a8")


def test_a_comparison_without_a_single_finite_figure_still_has_a_page(report, structure_of):
    for row in report["rows"]:
        row |= {"psnr_db": math.nan, "psnr_db_by_seed": [math.nan], "noise_nmse": math.inf}
    page = render_comparison_page(report)
    assert "No PSNR is finite." in section(page, "sizes")
    assert structure_of(page).names >= {"section", "svg"}


# --- ranking


def at(report, *psnr_db):
    rows = [row | {"psnr_db": value} for row, value in zip(report["rows"], psnr_db, strict=False)]
    return verdict(ranked(rows))


@pytest.mark.parametrize(
    ("psnr_db", "said"),
    [
        ((50.5, 41.25, 12.0), "“title of tlq” wins with 50.50 dB; the best published method, “title of rtn”, has "
                              "41.25 dB, 9.25 dB less."),
        ((30.0, 12.0, 33.5), "“title of broken” wins with 33.50 dB; the best of ours, “title of tlq”, has 30.00 dB, "
                             "3.50 dB less."),
        ((math.inf, 41.0, 12.0), "wins with ∞ dB; the best published method, “title of rtn”, has 41.00 dB, ∞ dB less."),
        ((41.0, 41.0, 12.0), "“title of tlq” wins with 41.00 dB; the best published method, “title of rtn”, has "
                             "41.00 dB, as many."),
        ((50.5, None, math.nan), "the best published method, “title of rtn”, could not be measured."),
        ((None, math.nan, None), "At W4A8 no image could be compared."),
        ((50.5,), "wins with 50.50 dB; no published method was compared."),
    ],
)  # fmt: skip
def test_the_verdict_names_both_sides_and_the_gap(report, psnr_db, said):
    assert at(report, *psnr_db).endswith(said)


def test_without_ours_the_verdict_says_so(report):
    assert verdict(rows_at(report | {"rows": report["rows"][1:3]}, (4, 8))).endswith("; nothing of ours was compared.")


def test_a_report_of_finite_figures_is_written_as_it_is(report):
    report["rows"].pop()
    assert finite(report) == report


# --- pictures


def shown_in(picture):
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def dots_in(picture):
    """Markers: matplotlib places a shape once for each."""
    return picture.count("<use ")


def test_bars_are_labelled_with_what_the_table_says(report):
    rows = rows_at(report, (3, 6))
    shown = shown_in(psnr_bars("psnr", rows))
    assert {"33.00", "30.00", "–", "title of broken"} <= set(shown)
    shown = shown_in(noise_bars("noise", rows))
    assert {"4.2e-4", "∞", "title of broken"} <= set(shown)


def test_every_seed_of_a_bar_is_a_dot(report):
    rows = rows_at(report, (4, 8))
    more = [row | {"psnr_db_by_seed": [*row["psnr_db_by_seed"], 30.0]} for row in rows]
    assert dots_in(psnr_bars("psnr", more)) - dots_in(psnr_bars("psnr", rows)) == len(rows)


def test_a_method_is_a_curve_over_its_bits(report):
    cheaper = [row | {"bits": 3, "bits_per_weight": 3.28} for row in report["rows"][:3]]
    picture = psnr_against_size("sizes", report | {"rows": [*report["rows"][:3], *cheaper]}, 8)
    assert [shown_in(picture).count(f"title of {name}") for name in ("tlq", "rtn", "broken")] == [1, 1, 1]
    assert psnr_against_size("sizes", report, 16) is None


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([1.0, 9.0, 5.0], [1.0, 9.0, 5.0]),  # far enough apart: left where they are
        ([5.0, 5.0], [4.5, 5.5]),
        ([5.2, 5.0, 5.1], [6.1, 4.1, 5.1]),
        ([5.0, 5.0, 6.2], [4.4, 5.4, 6.4]),  # two make room for each other and run into the third
        ([], []),
    ],
)
def test_labels_are_spread_no_further_than_they_must(values, places):
    assert spread(values, 1.0) == pytest.approx(places)
