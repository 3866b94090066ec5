"""A disk that fills up while any stage writes: one line, exit 4, an earlier package untouched, the build goes on."""

import copy
import functools
import json
import shutil

import check_resume
import pytest

from lrq_export import compiler
from lrq_export.compiler import build


@pytest.mark.parametrize("size", [100, 4096, 40_000])  # the recipe or the state, the reference, the statistics
def test_a_full_disk_is_one_line_and_the_build_can_go_on(tiny, package, cli, copy_of, digests, size, file_size_limit):
    out = copy_of(package)
    before = digests(out)
    arguments = ["build", tiny.source, "-o", out, *tiny.arguments, "--set", "sampling.seed=1", "--until", "calibrate"]
    with file_size_limit(size):
        outcome = cli(*arguments)
    outcome.refused(4, out, "too large", "resumes")
    assert digests(out) == before
    assert cli(*arguments).code == 0
    assert digests(out) == before


@pytest.fixture(scope="module")
def climb_once():
    """`compiler.climb`, which gives the findings of its first call again: they do not depend on what fails later."""
    climb, found = compiler.climb, []

    def climb_or_remember(*arguments, **options):
        if not found:
            found.append(climb(*arguments, **options))
        return copy.deepcopy(found[0])

    return climb_or_remember


@pytest.fixture(scope="module")
def out(tiny, package, tmp_path_factory, reseal):
    """Where an earlier package is, of other inputs, and beside it a build that got as far as its traced graph."""
    folder = tmp_path_factory.mktemp("full") / "package"
    shutil.copytree(package, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "of other inputs"}))
    reseal(folder)
    build(tiny.source, folder, recipe=tiny.recipe(), calibration=tiny.calibration, until="trace")
    return folder


# By what is being written: the function that the compiler calls for it, the most bytes that fit, the file that fails.
# In the order of the build, which resumes from one to the next.
PLACES = {
    "a rewritten graph": ("save_graph", 4096, "graphs/1-constant_fold.onnx"),
    "a quantized layer": ("quantize_layers", 300, "layers/transformer_blocks.0.attn1.to_k.safetensors"),
    "the quantized file": ("assemble", 4096, "quantized.safetensors"),
    "the portable model": ("write_portable", 4096, "model.onnx"),
    "the engine": ("build_engine", 4096, "engine/onnxruntime/model.onnx"),
    "the report": ("write_json_atomic", 4096, "report.json"),
    "the page": ("write_report_page", 4096, "report.html"),
    "the manifest": ("write_manifest", 1024, "manifest.json"),
}


@pytest.mark.parametrize(("function", "size", "file"), PLACES.values(), ids=PLACES.keys())
def test_a_full_disk_in_any_later_stage_is_one_line(
    tiny, out, cli, digests, monkeypatch, climb_once, file_size_limit, function, size, file
):
    monkeypatch.setattr(compiler, "climb", climb_once)
    write = getattr(compiler, function)

    @functools.wraps(write)
    def write_on_full_disk(*arguments, **options):
        with file_size_limit(size):
            return write(*arguments, **options)

    before = digests(out)
    monkeypatch.setattr(compiler, function, write_on_full_disk)
    cli("build", tiny.source, "-o", out, *tiny.arguments).refused(4, file, "too large", "free bytes", "resumes")
    assert digests(out) == before
    assert check_resume.leftovers(out) == [f"{out}.partial"]
    assert not list(out.parent.rglob("*.lrq-writing"))  # half a file would keep the disk full


def test_with_space_the_build_ends_with_the_bytes_of_an_undisturbed_one(tiny, out, package, cli, copy_of):
    out = copy_of(out.parent) / out.name
    assert cli("build", tiny.source, "-o", out, *tiny.arguments).code == 0
    assert check_resume.differing(check_resume.lasting_bytes(out), check_resume.lasting_bytes(package)) == []
    assert check_resume.leftovers(out) == []
