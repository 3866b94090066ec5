"""The documentation tells the truth: what it names exists, what it shows parses, what it tabulates is derived.

Commands that need a trained model or a minute are checked against the command line's own parser; cheap ones are run.
"""

import ast
import importlib
import re
import shlex
import sys
from itertools import chain
from pathlib import Path

import click
import pytest
import typer

import lrq_export
from graphs.ops import OPS
from graphs.passes import ACTIVATIONS, PIPELINE, TARGETS, target_passes
from lrq_export import cli
from lrq_export.errors import LrqError
from lrq_export.models.pixart import PixArt
from lrq_export.quant.level_sets import searched_sets, valid_sets
from lrq_export.recipe import KEYS, PRESETS, Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
README, GRAPH = ROOT / "README.md", ROOT / "docs" / "graph.md"
_PAGES = [README, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
PAGES = {str(path.relative_to(ROOT)): path for path in _PAGES}
SCRIPTS = {path.name: path for path in (ROOT / "tools").iterdir() if path.is_file()}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of one language, without the indentation of the fence."""
    found = FENCE.findall(path.read_text())
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, tag, text in found if tag == language]


def commands(path: Path) -> list[list[str]]:
    """Every line of the bash blocks, split into words."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text())


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def op_table() -> str:
    """docs/graph.md holds exactly this between its `ops` markers."""
    lines = ["| op | inputs | attributes | meaning |", "|---|---|---|---|"]
    for spec in OPS.values():
        inputs = "; ".join(f"`{tensor.name}` {tensor.type} {tensor.shape}" for tensor in spec.inputs)
        attributes = ", ".join(f"`{attribute.name}`" for attribute in spec.attributes)
        lines.append(f"| `{spec.name}` | {cell(inputs)} | {attributes} | {cell(spec.doc)} |")
    return "\n".join(lines)


def attribute_table() -> str:
    """docs/graph.md holds exactly this between its `attributes` markers."""
    lines = ["| attribute | meaning | default |", "|---|---|---|"]
    rows = {attribute.name: [] for spec in OPS.values() for attribute in spec.all_attributes()}
    for spec in OPS.values():
        for attribute in spec.all_attributes():
            doc = cell(attribute.doc) + (f" ({', '.join(map(str, attribute.choices))})" if attribute.choices else "")
            default = "" if attribute.default is None else f"`{attribute.default!r}`"
            if (doc, default) not in [row[1:] for row in rows[attribute.name]]:
                rows[attribute.name].append((spec.name, doc, default))
    for name, meanings in rows.items():
        for op, doc, default in meanings:
            lines.append(f"| `{name}`{f' of {op}' if len(meanings) > 1 else ''} | {doc} | {default} |")
    return "\n".join(lines)


def between(text: str, marker: str) -> re.Match:
    """The part of a page that is made, as group 1."""
    pattern = rf"<!-- {marker}: made by tests/test_docs\.py -->\n(.*?)<!-- end of {marker} -->"
    found = re.search(pattern, text, re.DOTALL)
    assert found, f"the page lost its markers of {marker}"
    return found


@pytest.mark.parametrize(("marker", "table"), [("ops", op_table), ("attributes", attribute_table)])
def test_the_tables_of_the_dialect_are_derived_from_it(marker, table):
    assert between(GRAPH.read_text(), marker)[1] == table() + "\n", "run `python tests/test_docs.py` to write it anew"


def test_the_passes_are_described_in_their_order():
    rows = re.findall(r"^\| `(\w+)` \|", between(GRAPH.read_text(), "passes")[1], re.MULTILINE)
    assert rows == [step.__name__ for step in PIPELINE]


def test_the_passes_of_targets_are_described():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", between(GRAPH.read_text(), "target passes")[1], re.MULTILINE)
    passes = {name: [*chain(*(target_passes(name, element) for element in ACTIVATIONS))] for name in TARGETS}
    steps = dict.fromkeys(chain(*ACTIVATIONS.values(), *passes.values()))
    uses = {step.__name__: [f"`{name}`" for name, used in passes.items() if step in used] for step in steps}
    assert rows == [(name, ", ".join(targets)) for name, targets in uses.items()]


def test_the_counts_of_level_sets_are_right():
    rows = re.findall(r"^ *\| (\d) \| (\d+) \| (\d+) \|$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    counted = [(bits, len(valid_sets(bits).levels), len(searched_sets(bits).levels)) for bits in (2, 3, 4)]
    assert [tuple(map(int, row)) for row in rows] == counted


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES.keys())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(path)):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES.keys())
def test_files_that_are_named_exist(path):
    for name in re.findall(r"`((?:tools|docs|tests|graphs|plugins|examples|lrq_export)/[\w./-]+)`", prose(path)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:quant|calibrate|verify|models|engine)/\w+\.py)`", prose(path)):
        assert (ROOT / "lrq_export" / name).exists(), name


@pytest.mark.parametrize("path", [*PAGES.values(), *SCRIPTS.values()], ids=[*PAGES.keys(), *SCRIPTS.keys()])
def test_nobody_s_machine_is_named(path):
    found = re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt|opt|data)/[\w./-]*", path.read_text())
    assert found == []


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES.keys())
def test_python_that_is_shown_parses_and_names_what_exists(path):
    for text in blocks(path, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lrq_export":
                assert callable(getattr(lrq_export, node.attr))


def test_the_inputs_shown_for_model_onnx_are_the_model_s():
    config = {"in_channels": 1, "patch_size": 2, "caption_channels": 64, "sample_size": 16}
    (shown,) = [text for text in blocks(README, "python") if "InferenceSession" in text]
    assert re.findall(r'^ +"([\w.]+)": ', shown, re.MULTILINE) == list(PixArt().inputs(config))


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES.keys())
def test_no_figure_is_left_to_fill_in(path):
    assert "FILL" not in path.read_text()


def lrq_command() -> click.Group:
    return typer.main.get_command(cli.app)


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES.keys())
def test_commands_that_are_named_exist(path):
    for name in re.findall(r"`lrq-export ([a-z]+)", path.read_text()):
        assert name in lrq_command().commands, f"lrq-export {name}"


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES.keys())
def test_commands_that_are_shown_are_understood(path):
    for program, *words in commands(path):
        if program == "lrq-export":
            command = lrq_command()
            while hasattr(command, "commands"):
                command, words = command.commands[words[0]], words[1:]
            command.make_context(command.name, words)  # parses the flags; runs nothing
        elif program in ("python", "bash"):
            script = next(word for word in words if not word.startswith("-"))
            assert (ROOT / script).is_file() or words[0] == "-m", script
        else:
            assert program in ("pip", "cmake", "tools/demo", "tools/test"), f"{path}: {program}"


def test_the_scripts_of_the_readme_can_be_run():
    for name in ("tools/demo", "tools/test", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111, f"{name} is not executable"
    assert "tools/test" in [" ".join(words) for words in commands(README)]
    assert "tools/test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_recipe_that_init_writes_is_the_preset(tmp_path, monkeypatch, capsys):
    """The README's own lines, run: init, then its --set on the file that init wrote."""
    init = next(words for words in commands(README) if words[:2] == ["lrq-export", "init"])
    build = next(words for words in commands(README) if "--recipe" in words)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", init)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    recipe = Path(capsys.readouterr().out.strip())
    assert load_recipe(path=recipe) == PRESETS[init[init.index("--preset") + 1]]
    key, _, value = build[build.index("--set") + 1].partition("=")
    assert load_recipe(path=recipe, overrides={key: value}).weights.group_size == int(value)


def test_the_keep_patterns_shown_are_a_recipe_s(tmp_path):
    (shown,) = re.findall(r"`(keep = \[.*?\])`", README.read_text(), re.DOTALL)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(shown)
    assert load_recipe(path=recipe).keep[: len(PixArt.keep)] == PixArt.keep


def test_the_keys_and_presets_that_are_named_exist():
    text = "\n".join(prose(path) for path in PAGES.values())
    tables = {key.partition(".")[0] for key in KEYS if "." in key}
    for key in re.findall(rf"`((?:{'|'.join(tables)})\.\w+)", text):
        assert key in KEYS or key.endswith((".py", ".safetensors")), key
    assert set(PRESETS) <= set(re.findall(r"`(w\da\d)`", README.read_text()))
    assert Recipe() == PRESETS["w4a8"], "the README calls w4a8 the default"


def test_the_exit_codes_are_the_errors():
    rows = {int(code) for code in re.findall(r"^\| (\d) \|", README.read_text(), re.MULTILINE)}
    assert rows == {0} | {kind.exit_code for kind in LrqError.__subclasses__()}


def test_every_pinned_version_is_exact_and_every_requirement_is_pinned():
    import tomllib

    pins = [line for line in SCRIPTS["constraints.txt"].read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        assert re.sub(r"[-_.]+", "-", re.match(r"[\w-]+", requirement)[0]).lower() in pinned, requirement


if __name__ == "__main__":
    page = GRAPH.read_text()
    for marker, table in (("ops", op_table), ("attributes", attribute_table)):
        start, end = between(page, marker).span(1)
        page = page[:start] + table() + "\n" + page[end:]
    GRAPH.write_text(page)
