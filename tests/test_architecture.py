"""The rules of the house that a machine can hold: which way imports point, how long things get, what never appears."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {name: sorted((ROOT / name).rglob("*.py")) for name in ("graphs", "lrq_export")}
FILES = {str(path.relative_to(ROOT)): path for paths in PACKAGES.values() for path in paths}
MAX_FILE, MAX_FUNCTION = 500, 80

# (who, must not import whom, but for these files)
ARROWS = {
    "graphs knows no torch": ("graphs", ("torch", "diffusers", "safetensors"), ()),
    "graphs knows no TensorRT and no ONNX Runtime": ("graphs", ("tensorrt", "tensorrt_rtx", "onnxruntime"), ()),
    "graphs knows no driver": ("graphs", ("lrq_export",), ()),
    "ops know no passes": ("graphs/ops", ("graphs.passes", "graphs.traced", "graphs.checks"), ()),
    "passes know no checks": ("graphs/passes", ("graphs.checks", "graphs.float_model"), ()),
    "nothing knows the command line": ("lrq_export", ("lrq_export.cli",), ("lrq_export/__main__.py",)),
    "nothing knows its tests and tools": ("", ("tests", "tools", "pytest", "hypothesis"), ()),
    "no pickle": ("", ("pickle", "cPickle", "dill", "cloudpickle", "joblib"), ()),
}


def imported(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, inside functions too; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def broken(arrow: tuple[str, tuple[str, ...], tuple[str, ...]], files: dict[str, Path]) -> list[str]:
    who, forbidden, excepted = arrow
    inside = [name for name in files if not who or name.startswith(f"{who}/")]
    return [
        f"{name} imports {target}"
        for name in inside
        if name not in excepted
        for target in imported(files[name])
        if any(is_within(target, module) for module in forbidden)
    ]


def test_the_packages_are_found():
    assert all(len(paths) > 5 for paths in PACKAGES.values())


@pytest.mark.parametrize("arrow", ARROWS.values(), ids=ARROWS.keys())
def test_imports_point_one_way(arrow):
    assert broken(arrow, FILES) == []


@pytest.mark.parametrize(
    "line",
    ["import torch", "from torch import nn", "def late():\n    import torch.nn", "from lrq_export import errors"],
)
def test_a_forbidden_import_is_seen(line, tmp_path):
    path = tmp_path / "graphs" / "bad.py"
    path.parent.mkdir()
    path.write_text(line)
    arrows = [ARROWS["graphs knows no torch"], ARROWS["graphs knows no driver"]]
    assert any(broken(arrow, {"graphs/bad.py": path}) for arrow in arrows)


@pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())
def test_files_and_functions_can_be_read_in_one_sitting(path):
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= MAX_FILE, f"{path} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())
def test_every_module_says_what_it_promises(path):
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
