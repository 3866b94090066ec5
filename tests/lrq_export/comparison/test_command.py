"""`lrq-export compare`: several values after one flag, what is refused before any work, and one real comparison."""

import json

import pytest

from lrq_export.comparison.treatments import DEFAULT, TREATMENTS
from lrq_export.errors import InputError, UsageError
from lrq_export.package import FORMAT, MANIFEST
from lrq_export.recipe import load_recipe
from lrq_export.several_values import flag_before_each_value


@pytest.fixture
def compared(monkeypatch, report):
    """The calls of `compare`, which returns the made-up report in place of a real one."""
    calls = []

    def compare(source, methods, **options):
        calls.append({"source": str(source), "methods": methods} | options)
        return report

    monkeypatch.setattr("lrq_export.comparison.run.compare", compare)
    return calls


# --- several values after one flag

ASKED = {
    "as one flag each": "SOURCE --methods tlq rtn --bits 4 3 --acts 8 6 --seeds 1 2",
    "as repeated flags": "SOURCE --methods tlq --methods rtn --bits 4 --bits 3 --acts 8 --acts 6 --seeds 1 --seeds 2",
    "with commas": "SOURCE --methods tlq,rtn --bits 4,3 --acts 8,6 --seeds 1,2",
    "with commas and spaces": "SOURCE --methods tlq, rtn --bits 4, 3 --acts 8, 6 --seeds 1, 2",
    "with equals signs": "SOURCE --methods=tlq rtn --bits=4 3 --acts=8,6 --seeds=1 2",
    "in bits and pieces": "SOURCE --methods tlq --bits 4 --methods rtn --acts 8 --bits 3 --acts 6 --seeds 1 2",
    "with the source in the middle": "--methods tlq rtn --bits 4 3 SOURCE --acts 8 6 --seeds 1 2",
    "with the source at the end": "--bits 4 3 --acts 8 6 --seeds 1 2 --methods tlq rtn -- SOURCE",
    "with values twice": "SOURCE --methods tlq rtn tlq --bits 4 3 4 --acts 8 6 --seeds 1 2 02",
}


@pytest.mark.parametrize("words", ASKED.values(), ids=ASKED.keys())
def test_values_are_taken_in_every_way_they_can_be_written(cli, compared, tmp_path, words):
    assert cli("compare", "-o", tmp_path / "page.html", *words.split()).code == 0
    (call,) = compared
    assert (call["source"], call["methods"]) == ("SOURCE", ["tlq", "rtn"])
    assert (call["bits"], call["act_bits"], call["seeds"]) == ([4, 3], [8, 6], [1, 2])


def test_a_folder_after_the_methods_is_the_source(cli, compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "rtn").mkdir()  # a method's name, all the same
    assert cli("compare", "-o", "page.html", "--methods", "tlq", "rtn", "model").code == 0
    assert (compared[0]["source"], compared[0]["methods"]) == ("model", ["tlq", "rtn"])


def test_other_flags_keep_to_one_value():
    words = ["--set", "a=1", "SOURCE", "--bits", "4", "-o", "3"]
    assert flag_before_each_value(words) == words


@pytest.mark.parametrize("words", [["--bits"], ["--bits", "--acts", "8"], ["SOURCE", "--bits", "4", "--methods", "-o"]])
def test_a_flag_without_a_value_is_refused(words):
    with pytest.raises(UsageError, match=r"--\w+: got .*, needed at least one value. Fix: e\.g\. --"):
        flag_before_each_value(words)


def test_without_flags_the_defaults_are_compared(cli, compared, tmp_path):
    assert cli("compare", "SOURCE", "-o", tmp_path / "page.html").code == 0
    (call,) = compared
    assert call["methods"] == list(DEFAULT)
    assert (call["bits"], call["act_bits"], call["seeds"]) == ([4, 3], [8, 6], [0, 1, 2])
    assert call["recipe"] == load_recipe()
    assert (call["calibration"], call["conditions"], call["judge"]) == (None, None, None)


def test_files_and_settings_are_passed_on(cli, compared, tmp_path):
    words = ["--calibration", "c", "--conditions", "d", "--judge", "e", "--images", "3", "--set", "sampling.steps=2"]
    assert cli("compare", "SOURCE", "-o", tmp_path / "page.html", *words).code == 0
    (call,) = compared
    assert [str(call[name]) for name in ("calibration", "conditions", "judge")] == ["c", "d", "e"]
    assert call["recipe"] == load_recipe(overrides={"sampling.images": "3", "sampling.steps": "2"})


# --- what is refused before any work is done

WRONG = {
    "bits that are words": (["--bits", "four"], "--bits: got 'four'"),
    "acts that are words": (["--acts", "8,x"], "--acts: got '8,x'"),
    "commas alone": (["--methods", ","], "--methods: got ','"),
    "no values": (["--bits"], "--bits: got nothing"),
    "a flag for a value": (["--seeds", "--json"], "--seeds: got --json"),
    "a seed too large": (["--seeds", str(2**63)], "--seeds: got 9223372036854775808"),
    "no images": (["--images", "0"], "--images"),
    "no pair": (["--set", "sampling.steps"], "--set: got 'sampling.steps'"),
    "an unknown key": (["--set", "sampling.step=2"], "did you mean sampling.steps?"),
    "bits in the recipe": (["--set", "weights.bits=3"], "weights.bits: a comparison does not read it: --methods and"),
    "a seed in the recipe": (["--set", "sampling.seed=3"], "--seeds chooses it"),
    "a second source": (["OTHER"], "OTHER"),
}


@pytest.mark.parametrize(("words", "part"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_end_in_one_line(cli, compared, tmp_path, words, part):
    cli("compare", "SOURCE", "-o", tmp_path / "page.html", *words).refused(2, part)
    assert compared == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", "is a folder"),
        ("folder.html", "is a folder"),
        ("taken.html", "taken.json: is a folder"),
        ("page.json", "needed the name of a page"),
        ("page", "needed the name of a page"),
        ("none/page.html", "its folder does not exist"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused(cli, compared, tmp_path, name, part):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "taken.json").mkdir()
    cli("compare", "SOURCE", "-o", tmp_path / name).refused(2, part)
    assert compared == []


def test_a_page_never_spoils_a_model_or_a_package(cli, compared, tiny, copy_of, tmp_path):
    source = copy_of(tiny.source)
    cli("compare", source, "-o", source / "config.html").refused(2, source, "lies in the source folder")
    package = tmp_path / "package"
    (package / "engine").mkdir(parents=True)
    (package / MANIFEST).write_text(json.dumps({"format": FORMAT}))
    for page in (package / "report.html", package / "engine" / "page.html"):
        cli("compare", source, "-o", page).refused(2, page, "lies in a package")
    assert compared == []


def test_methods_and_bits_that_are_unknown_are_refused(cli, tiny, tmp_path):
    asked = ["compare", tiny.source, "-o", tmp_path / "page.html"]
    cli(*asked, "--methods", "tlq", "rnt").refused(2, "got 'rnt'", *TREATMENTS, "did you mean rtn?")
    cli(*asked, "--bits", "4", "5").refused(2, "--bits: got [5]")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_comparison_is_one_line(cli, monkeypatch, tmp_path):
    def compare(*_, **__):
        raise InputError("weights: are gone", hint="download them again")

    monkeypatch.setattr("lrq_export.comparison.run.compare", compare)
    cli("compare", "SOURCE", "-o", tmp_path / "page.html").refused(3, "weights: are gone")
    assert list(tmp_path.iterdir()) == []


# --- what is printed and written


def test_the_table_ranks_the_methods(cli, compared, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    outcome = cli("compare", "SOURCE", "-o", tmp_path / "page.html")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    found = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "title of" in line and "│" in line]
    assert found[0] == ["title of tlq", "50.50", "4.2e-4", "1.234", "95.3%", "4.28", "12.3", "yes"]
    assert [cells[0] for cells in found[3:]] == ["title of rtn", "title of tlq", "title of broken"]
    assert found[-1] == ["title of broken", "–", "∞", "–", "–", "3.28", "12.3", "no"]
    assert "accuracy in floating point: 98.5%" in lines
    assert "warning: no calibration was given" in lines
    assert lines[-2:] == [f"page:   {tmp_path / 'page.html'}", f"report: {tmp_path / 'page.json'}"]


def test_json_lines_take_the_place_of_the_table(cli, compared, report, tmp_path):
    outcome = cli("compare", "SOURCE", "-o", tmp_path / "page.html", "--json")
    events = [json.loads(line, parse_constant=pytest.fail) for line in outcome.out.splitlines()]
    assert [event["event"] for event in events] == ["row"] * len(report["rows"]) + ["reference", "written"]
    assert events[0]["psnr_db"] == 50.5
    assert events[-2]["accuracy"] == 0.985
    assert events[-1]["report"] == str(tmp_path / "page.json")


def test_a_real_model_is_compared(cli, tiny, tmp_path):
    out = tmp_path / "page.html"
    outcome = cli(
        "compare", tiny.source, "--methods", "tlq", "rtn", "--bits", "4", "--acts", "8", "--seeds", "0", "-o", out,
        "--calibration", tiny.calibration, "--images", "2", "--set", "sampling.steps=2", "--set",
        "calibration.samples=8",
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads((tmp_path / "page.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["tlq", "rtn"]
    ours, published = report["rows"]
    assert 0 < ours["noise_nmse"] < published["noise_nmse"] < 0.5
    assert all(10 < row["psnr_db"] < 90 for row in report["rows"])  # two steps of random weights rank nobody
    page = out.read_text()
    assert all(f"{row['psnr_db']:.2f}" in page for row in report["rows"])
    assert all(f"{row['psnr_db']:.2f}" in outcome.out for row in report["rows"])
    assert all(each["layers"][0] in page for each in report["inputs"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.json"]
