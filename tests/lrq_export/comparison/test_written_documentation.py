"""The tool that writes a comparison into the documentation."""

import json
import sys

import pytest
from write_comparison import BEGIN, END, main, rewritten, section, table

from lrq_export.comparison.ranking import finite
from lrq_export.errors import InputError

PAGE = f"# Title\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n"


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Run the tool over reports into a page of its own; returns the page's text."""

    def run(*reports, page=PAGE):
        target, paths = tmp_path / "page.md", []
        target.write_text(page)
        for number, report in enumerate(reports):
            paths.append(tmp_path / f"{number}.json")
            paths[-1].write_text(report if isinstance(report, str) else json.dumps(finite(report)))
        monkeypatch.setattr(sys, "argv", ["write_comparison.py", *map(str, paths), "--into", str(target)])
        main()
        return target.read_text()

    return run


def rows_of(text, head):
    """The lines of the table whose first column is called `head`, as lists of cells."""
    (found,) = [block for block in text.split("\n\n") if block.startswith(f"| {head} |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found.splitlines()]


def test_one_table_ranks_the_methods_at_every_setting(report):
    head, _, *rows = rows_of(section(finite(report)), "mean PSNR in dB")
    assert head == ["mean PSNR in dB", "W4A8", "W3A6"]
    assert rows == [
        ["title of tlq", "**50.50**", "30.00"],
        ["title of rtn", "41.25", "**33.00**"],
        ["title of broken", "12.00", "–"],
    ]


def test_the_other_figures_stand_in_the_order_of_the_settings(report):
    head, _, *rows = rows_of(section(finite(report)), "method")
    assert head == ["method", "ε-NMSE", "Fréchet", "accuracy", "bits a weight", "seconds"]
    assert rows[0][1:] == ["4.2e-4 / 4.2e-4", "1.234 / 1.234", "95.3% / 95.3%", "4.28 / 3.28", "12.3 / 12.3"]
    assert rows[2][1:4] == ["4.2e-4 / –", "1.234 / –", "95.3% / –"]


def test_a_sentence_for_every_setting_and_what_was_measured(report):
    text = section(finite(report))
    assert "### PixArt, `digits`" in text
    assert "40 images of seeds 5, 7, 20 steps of DDIMScheduler." in text
    assert "The floating-point model's own accuracy is 98.5%. Seconds on Xeon 8488C, 2 cores." in text
    assert "- At W4A8 “title of tlq” wins with 50.50 dB; the best published method, “title of rtn”, has 41.25" in text
    assert "- At W3A6 “title of rtn” wins with 33.00 dB; the best of ours, “title of tlq”, has 30.00 dB" in text


def test_a_method_that_was_not_run_at_a_setting_is_a_dash(report):
    report["rows"].pop(0)
    rows = rows_of(section(finite(report)), "mean PSNR in dB")
    assert ["title of tlq", "–", "30.00"] in rows


def test_without_a_judge_nothing_is_said_of_accuracy(report):
    report["reference"] = {"accuracy": None, "frechet": None}
    assert "own accuracy" not in section(finite(report))


def test_a_bar_in_a_name_does_not_end_its_cell():
    assert table(["a|b"], [["c"]]).splitlines()[0] == r"| a\|b |"


def test_only_what_stands_between_the_markers_changes(write, report):
    text = write(report, report | {"source": {"name": "second", "class_name": "DiT"}})
    before, after = PAGE.split(f"{BEGIN}\nold\n{END}")
    assert text.startswith(before + BEGIN)
    assert text.endswith(END + after)
    assert "old" not in text
    assert text.index("### PixArt, `digits`") < text.index("### DiT, `second`")
    assert write(report, page=text) == write(report)


@pytest.mark.parametrize("page", ["no markers", f"{END}\n{BEGIN}\n", BEGIN])
def test_a_page_without_its_markers_is_refused(page):
    with pytest.raises(InputError, match=r"page\.md: needed a line"):
        rewritten(page, ["text"], "page.md")


@pytest.mark.parametrize("data", ["{", "[]", "{}", '{"schema": 1, "rows": []}', '{"schema": 99, "rows": [1]}'])
def test_what_is_no_report_is_refused(write, tmp_path, data):
    with pytest.raises(SystemExit, match=r"0\.json: "):
        write(data)
    assert (tmp_path / "page.md").read_text() == PAGE


def test_a_page_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["write_comparison.py", "report.json", "--into", str(tmp_path / "none.md")])
    with pytest.raises(SystemExit, match=r"none\.md: no such file"):
        main()
