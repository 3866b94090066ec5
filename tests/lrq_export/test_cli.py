"""The command line: shows long work on a terminal only, and refuses what it can before any work is done."""

import json
import shutil

import pytest

from lrq_export.package import verify_hashes


@pytest.fixture
def terminal(monkeypatch):
    """Call it to make rich take the captured standard error for a terminal."""
    return lambda: monkeypatch.setenv("FORCE_COLOR", "1")


@pytest.fixture
def verified(package, monkeypatch):
    """Instead of climbing the ladder again, which takes seconds: what the build found, less what only it could know."""

    def verify(folder, source, advance):
        for number in range(6):
            advance(f"R{number}")
        report = json.loads((package / "report.json").read_text())
        del report["tool"], report["source"]["path_name"]
        return report | {"timings": [], "warnings": []}, None

    monkeypatch.setattr("lrq_export.verify.run.verify", verify)


SHOWN = {
    "verify": (lambda package, folder: ("verify", package), ["verify", "6/6", "ETA"]),
    "report": (lambda package, folder: ("report", package, "-o", folder / "page.html"), ["verify", "6/6"]),
    "sample": (lambda package, folder: ("sample", package, "-o", folder / "s.png"), ["load", "1/1", "sample", "3/3"]),
}


@pytest.mark.parametrize(("command", "parts"), SHOWN.values(), ids=SHOWN.keys())
def test_long_work_shows_a_bar_on_a_terminal_alone(package, verified, cli, tmp_path, terminal, command, parts):
    arguments = command(package, tmp_path)
    silent = cli(*arguments)
    terminal()
    shown = cli(*arguments)
    assert (silent.code, silent.err) == (shown.code, "") == (0, "")
    assert [part for part in parts if part not in shown.err] == []


def test_the_page_of_the_report_command_tells_how_the_package_was_built(
    package, verified, cli, copy_of, reseal, tmp_path
):
    folder, out = copy_of(package), tmp_path / "page.html"
    report = json.loads((folder / "report.json").read_text())
    report["warnings"] = ["no calibration was given"]
    (folder / "report.json").write_text(json.dumps(report))
    reseal(folder)
    assert cli("report", folder, "-o", out).code == 0
    page = out.read_text()
    calibrating = next(row["seconds"] for row in report["timings"] if row["stage"] == "calibrate")
    wanted = [
        "<li>no calibration was given</li>",
        f'<td>calibrate</td><td class="n">{calibrating:.2f}</td>',
        f"lrq-export {report['tool']['version']}",
        f"<code>{report['source']['path_name']}</code>",
    ]
    assert [part for part in wanted if part not in page] == []


def test_json_takes_the_place_of_the_bar(package, cli, terminal):
    """Here the ladder is climbed for real."""
    terminal()
    outcome = cli("verify", package, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    events = [json.loads(line) for line in outcome.out.splitlines()]
    done = [(event["what"], event["done"], event["total"]) for event in events if event["event"] == "advance"]
    assert done == [(f"R{number}", number + 1, 6) for number in range(6)]
    assert [event["event"] for event in events if event.get("stage") == "verify" and event["event"] != "advance"] == [
        "begin", "end"]  # fmt: skip


def test_a_bar_is_taken_down_before_an_error_is_said(package, cli, tmp_path, terminal):
    terminal()
    outcome = cli("verify", package, "--source", tmp_path / "nowhere")
    assert outcome.code == 3
    *bars, error = outcome.err.split("lrq-export: ")
    assert "\x1b[?25h" in bars[0]  # the cursor is shown again
    assert error.startswith(f"{tmp_path / 'nowhere'}: got a path that does not exist")


# --- outputs that would spoil the package


def into_itself(folder, link):
    return folder / "samples.png"


def deep_into_itself(folder, link):
    return folder / "new" / "samples.png"


def over_its_own_page(folder, link):
    return folder / "report.html"


def through_a_link(folder, link):
    link.symlink_to(folder, target_is_directory=True)
    return link / "graphs" / "samples.png"


@pytest.mark.parametrize("command", ["sample", "report"])
@pytest.mark.parametrize("place", [into_itself, deep_into_itself, over_its_own_page, through_a_link])
def test_nothing_is_written_into_the_package(package, cli, copy_of, digests, tmp_path, command, place):
    folder = copy_of(package)
    before, out = digests(folder), place(folder, tmp_path / "link")
    cli(command, folder, "-o", out).refused(2, out, "lies in the package", "beside")
    assert digests(folder) == before
    verify_hashes(folder)


@pytest.mark.parametrize("command", ["sample", "report"])
def test_a_folder_is_no_name_for_an_output(package, cli, tmp_path, command):
    cli(command, package, "-o", tmp_path).refused(2, tmp_path, "is a folder")
    assert list(tmp_path.iterdir()) == []


# --- build --prompts: everything cheap is refused before the pipeline runs


@pytest.fixture
def pipeline(tiny, tmp_path):
    """A pipeline folder as far as a build looks at it; nothing in it could run."""
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny.source, folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    return folder


@pytest.fixture
def opened(monkeypatch):
    """The pipelines that were opened to be run."""
    found = []

    def open_pipeline(path):
        found.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr("lrq_export.calibrate.pipeline.open_pipeline", open_pipeline)
    return found


def foreign(out):
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"meow")


def a_file(out):
    out.write_text("text")


def nothing(out):
    pass


TOO_LATE = {
    "an output that holds something else": (foreign, (), 2, "cat.jpg"),
    "an output that is a file": (a_file, (), 2, "got a file"),
    "an unknown preset": (nothing, ("--preset", "w4a9"), 2, "did you mean w4a8?"),
    "a recipe that is not there": (nothing, ("--recipe", "none.toml"), 2, "none.toml"),
    "an unknown key": (nothing, ("--set", "weights.bit=3"), 2, "--set: weights.bit: unknown key"),
    "a wrong value": (nothing, ("--set", "weights.bits=5"), 2, "--set: weights.bits: got 5"),
    "a block that does not divide": (
        nothing,
        ("--set", "rotation.kind=hadamard", "--set", "rotation.block=16"),
        2,
        "rotation.block is 16",
    ),
    "a pattern that matches nothing": (nothing, ("--set", 'keep=["no.*"]'), 2, "'no.*' matches none"),
    "an unknown scheduler": (nothing, ("--set", "sampling.scheduler=Euler"), 2, "'Euler'"),
    "conditions that are not there": (nothing, ("--conditions", "none.safetensors"), 3, "none.safetensors"),
}


@pytest.mark.parametrize(("spoil", "flags", "code", "part"), TOO_LATE.values(), ids=TOO_LATE.keys())
def test_what_needs_no_pipeline_is_refused_before_it_runs(pipeline, opened, cli, tmp_path, spoil, flags, code, part):
    out = tmp_path / "out"
    spoil(out)
    before = sorted(tmp_path.rglob("*"))
    cli("build", pipeline, "-o", out, "--prompts", tmp_path / "prompts.txt", *flags).refused(code, part)
    assert opened == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_build_that_nothing_speaks_against_opens_the_pipeline(pipeline, opened, cli, tmp_path):
    cli("build", pipeline, "-o", tmp_path / "out", "--prompts", tmp_path / "prompts.txt").refused(5, "interrupted")
    assert opened == [pipeline]


@pytest.fixture
def asked(monkeypatch):
    """Recipes that a build was asked for, instead of building."""
    from lrq_export.compiler import BuildResult

    recipes = []

    def build(source, out, *, recipe, **_):
        recipes.append(recipe)
        return BuildResult(out, True, None, "load")

    monkeypatch.setattr("lrq_export.compiler.build", build)
    return recipes


@pytest.mark.parametrize(
    ("flags", "validation", "keep_going"),
    [
        ([], "full", False),
        (["--validate", "fast"], "fast", False),
        (["--validate", "full", "--set", "rewrite.validation=fast"], "full", False),
        (["--keep-going"], "full", True),
        (["--set", "rewrite.keep_going=true"], "full", True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_how_rewrites_are_proved_is_a_flag_and_a_recipe_key(tiny, cli, tmp_path, asked, flags, validation, keep_going):
    assert cli("build", tiny.source, "-o", tmp_path / "out", *flags).code == 0
    (recipe,) = asked
    assert (recipe.rewrite.validation, recipe.rewrite.keep_going) == (validation, keep_going)


def test_targets_are_a_flag_and_a_recipe_key(tiny, cli, tmp_path, asked):
    cli("build", tiny.source, "-o", tmp_path / "a", "--target", "tensorrt-rtx", "--target", "onnxruntime")
    cli("build", tiny.source, "-o", tmp_path / "b", "--set", 'engine.targets=["tensorrt"]')
    assert [recipe.engine.targets for recipe in asked] == [("tensorrt-rtx", "onnxruntime"), ("tensorrt",)]
