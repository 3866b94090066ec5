"""Engines added to a finished package: only what is missing is done, and the package is whole before and after."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from graphs import names
from graphs.passes.half_precision import BFLOAT16
from lrq_export.admit import admit
from lrq_export.bind import write_for_plugins
from lrq_export.compiler import build
from lrq_export.engine import targets, tensorrt
from lrq_export.engine.built import FOLDERS
from lrq_export.engine.targets import add_engines, engines
from lrq_export.errors import CheckFailed, InputError
from lrq_export.package import load_manifest, verify_hashes
from lrq_export.quantized import onnx_float
from lrq_export.recipe import Engine
from lrq_export.runtime import obstacle
from lrq_export.verify.target import Target

FOLDER = Path("engine/tensorrt-rtx")


def test_an_engine_is_added_and_nothing_else_changes(package, copy_of, builder, digests):
    folder = copy_of(package)
    before = digests(folder)
    assert add_engines(folder, ["tensorrt-rtx"]) == []
    manifest, after = verify_hashes(folder), digests(folder)
    assert {name for name in after if before.get(name) != after[name]} == {
        "manifest.json", "recipe.toml", "report.json", "report.html",
        *(f"{FOLDER}/{name}" for name in ("build.json", "model.onnx", "model.plan")),
    }  # fmt: skip
    assert before.keys() <= after.keys()
    assert manifest["recipe"]["engine"]["targets"] == ["onnxruntime", "tensorrt-rtx"]
    assert manifest["content_sha256"] != load_manifest(package)["content_sha256"]  # the recipe says another thing
    assert list(engines(folder)) == [("tensorrt-rtx", folder / FOLDER)]
    assert admit(folder) == manifest
    assert not list(folder.parent.glob("*.partial"))


def test_the_engine_that_only_a_build_writes_is_not_said_to_be_there(package, copy_of, reseal, cli):
    bare = copy_of(package)
    shutil.rmtree(bare / "engine/onnxruntime")
    reseal(bare)
    again = "build the package again"
    cli("build", bare, "--target", "onnxruntime").refused(4, "the package holds no ONNX Runtime engine", again)
    cli("verify", bare, "--against", "onnxruntime").refused(4, "holds no network for onnxruntime", again)
    assert "holds engines for onnxruntime" in cli("build", package, "--target", "onnxruntime").out


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_report_that_cannot_tell_of_an_engine_is_refused_before_one_is_built(package, copy_of, reseal, builder, name):
    folder = copy_of(package)
    (folder / name).unlink()
    reseal(folder)
    with pytest.raises(InputError, match=name):
        add_engines(folder, ["tensorrt-rtx"])
    assert builder == []
    assert not folder.with_name(folder.name + ".partial").exists()


def test_the_report_tells_of_the_added_engine_and_keeps_the_rest(package, copy_of, builder):
    folder = copy_of(package)
    add_engines(folder, ["tensorrt-rtx"])
    before, after = (json.loads((each / "report.json").read_text()) for each in (package, folder))
    engines_before, engines_after = before.pop("engines"), after.pop("engines")
    before["recipe"]["engine"]["targets"].append("tensorrt-rtx")
    assert before == after
    assert [row["target"] for row in engines_before] == ["onnxruntime"]
    assert engines_before[0]["bits_per_weight"] > 8  # decoded codes, scales and what is kept in floating point
    added = engines_after[1]
    assert added["target"] == "tensorrt-rtx"
    assert added["bytes"] == (folder / "engine/tensorrt-rtx/model.plan").stat().st_size
    assert added["profiles"][0]["samples"] == [1, 1, 4]
    was, now = ((each / "report.html").read_text() for each in (package, folder))
    (was, told_before, asked_before), (now, told, asked) = (parted(page, "engines", "origin") for page in (was, now))
    assert was == now
    assert "tensorrt-rtx" not in told_before + asked_before
    assert "none: standard ops" in told
    assert "before" not in told
    assert "tensorrt-rtx" in asked


def parted(page, *anchors):
    """A page without the sections of these names, and each of those."""
    sections = [re.search(rf'<section id="{anchor}">.*?</section>', page, re.DOTALL)[0] for anchor in anchors]
    for section in sections:
        page = page.replace(section, "")
    return page, *sections


def test_what_is_there_is_not_built_again(package, copy_of, builder, digests):
    folder = copy_of(package)
    add_engines(folder, ["tensorrt-rtx"])
    before = digests(folder)
    assert add_engines(folder, ["tensorrt-rtx", "onnxruntime"]) == []
    assert len(builder) == 1
    assert digests(folder) == before


def test_other_activations_build_that_engine_anew_and_only_it(package, copy_of, builder, digests):
    folder = copy_of(package)
    add_engines(folder, ["tensorrt-rtx", "tensorrt"])
    before = digests(folder)
    changes = {"activations": "float16"}
    assert add_engines(folder, ["tensorrt-rtx"], changes=changes) == []
    after = digests(folder)
    told = {"manifest.json", "recipe.toml", "report.json", "report.html"}
    assert {name for name in after if before.get(name) != after[name]} - told == {
        f"{FOLDER}/build.json", f"{FOLDER}/model.onnx"
    }  # fmt: skip
    assert [job["options"]["activations"] for job in builder] == ["float32", "float32", "float16"]
    assert add_engines(folder, ["tensorrt-rtx"], changes=changes) == []  # settings that are there already
    assert add_engines(folder, ["tensorrt-rtx"], changes=changes | {"hardware": "ampere_plus"}) == []  # of tensorrt
    assert len(builder) == 3


def test_an_engine_from_before_a_setting_was_there_has_its_default(package, copy_of, builder, reseal):
    folder = copy_of(package)
    add_engines(folder, ["tensorrt-rtx"])
    built = folder / FOLDER / "build.json"
    facts = json.loads(built.read_text())
    del facts["options"]["activations"]
    built.write_text(json.dumps(facts))
    reseal(folder)
    assert add_engines(folder, ["tensorrt-rtx"]) == []
    assert len(builder) == 1


@pytest.mark.parametrize(("activations", "half"), [("float16", 10), ("bfloat16", 16)])
@pytest.mark.parametrize("plugins", [False, True])
def test_half_precision_reaches_the_file_and_leaves_codes_and_edges(
    package, copy_of, builder, monkeypatch, tmp_path, activations, half, plugins
):
    monkeypatch.setattr(tensorrt, "find_library", lambda: tmp_path / "liblrq_plugins.so" if plugins else None)
    folder = copy_of(package)
    add_engines(folder, ["tensorrt"])
    was = onnx.load(folder / "engine/tensorrt/model.onnx").graph
    add_engines(folder, ["tensorrt"], changes={"activations": activations})
    now = onnx.load(folder / "engine/tensorrt/model.onnx").graph
    assert (now.input, now.output) == (was.input, was.output)
    held, wider = ({each.name: each for each in graph.initializer} for graph in (now, was))
    assert held["proj_out.weight"].data_type == half
    packed = [name for name in wider if name.endswith((".codes", ".exponents", ".scale"))]
    assert len(packed) > 10
    assert all(held[name] == wider[name] for name in packed)
    provider = folder / "engine/tensorrt/model_trt_plugins.onnx"
    assert provider.is_file() == plugins
    assert not plugins or onnx.load(provider).graph.initializer == now.initializer


def test_a_weight_that_float16_cannot_hold_is_refused():
    weight = torch.tensor([1.0, -70000.0])
    with pytest.raises(CheckFailed, match="w: got a weight of magnitude 70000, needed one that float16 holds"):
        onnx_float("w", weight, np.dtype(np.float16))
    assert onnx_float("w", weight, BFLOAT16).size == 4


def test_the_builder_is_told_sizes_and_options(package, copy_of, builder):
    changes = {"profiles": ("samples=2:2:6 height=8:8:16",), "compute_capabilities": ("86", "120")}
    add_engines(copy_of(package), ["tensorrt-rtx"], changes=changes)
    (job,) = builder
    assert job["profiles"][0]["timestep"] == [(2,), (2,), (6,)]
    assert [shape[2] for shape in job["profiles"][0]["hidden_states"]] == [8, 8, 16]
    assert job["options"]["compute_capabilities"] == ["86", "120"]
    assert (job["plugins"], job["plugin_nodes"]) == (None, {})


def test_without_plugins_the_network_has_standard_ops_alone(package, copy_of, builder):
    folder = copy_of(package)
    add_engines(folder, ["tensorrt-rtx"])
    model = onnx.load(folder / FOLDER / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}


def test_with_plugins_it_has_lrq_nodes_whose_codes_lie_in_words(package, copy_of, builder, monkeypatch, tmp_path):
    library = tmp_path / "liblrq_plugins.so"
    monkeypatch.setattr(tensorrt, "find_library", lambda: library)
    folder = copy_of(package)
    add_engines(folder, ["tensorrt-rtx"])
    nodes = [node for node in onnx.load(folder / FOLDER / "model.onnx").graph.node if node.domain == names.DOMAIN]
    layouts = {attribute.s for node in nodes for attribute in node.attribute if attribute.name == "layout"}
    assert layouts == {names.WORDS.encode()}
    (job,) = builder
    assert job["plugins"] == str(library)
    assert list(job["plugin_nodes"]) == [node.name for node in nodes]
    assert set(job["plugin_nodes"].values()) == {("float32", "float32")}
    assert json.loads((folder / FOLDER / "build.json").read_text())["nodes"] == len(nodes) > 10


def test_onnx_runtimes_provider_gets_the_same_network_in_its_domain(package, copy_of, builder, monkeypatch, tmp_path):
    """Weights beside the file are written once, and both networks refer to them."""
    monkeypatch.setattr(tensorrt, "find_library", lambda: tmp_path / "liblrq_plugins.so")
    monkeypatch.setattr(tensorrt, "write_for_plugins", partial(write_for_plugins, inline_limit=0))
    folder = copy_of(package)
    add_engines(folder, ["tensorrt"])
    ours, provider = (onnx.load(folder / "engine/tensorrt" / name) for name in ("model.onnx", "model_trt_plugins.onnx"))
    assert not (folder / "engine/tensorrt/model_trt_plugins.onnx.data").exists()
    moved = [node for node in provider.graph.node if node.domain == names.TRT_PLUGINS]
    assert len(moved) > 10
    assert {node.domain for node in provider.graph.node} == {"", names.TRT_PLUGINS}
    assert {entry.domain for entry in provider.opset_import} == {"", names.TRT_PLUGINS}
    for node in moved:
        node.domain = names.DOMAIN
    assert provider.graph == ours.graph


@pytest.mark.parametrize(("target", "plugins"), [("tensorrt", False), ("tensorrt-rtx", True)])
def test_other_engines_have_no_network_of_the_provider(
    package, copy_of, builder, monkeypatch, tmp_path, target, plugins
):
    monkeypatch.setattr(tensorrt, "find_library", lambda: tmp_path / "liblrq_plugins.so" if plugins else None)
    folder = copy_of(package)
    add_engines(folder, [target])
    assert (folder / f"engine/{target}/model.onnx").is_file()
    assert not (folder / f"engine/{target}/model_trt_plugins.onnx").exists()


def test_plugins_that_must_be_there_and_are_not_leave_the_package_as_it_was(package, copy_of, builder, digests):
    folder = copy_of(package)
    (missing,) = add_engines(folder, ["tensorrt-rtx"], changes={"plugins": "always"})
    assert "run lrq-export plugins build" in str(missing)
    verify_hashes(folder)
    assert list(engines(folder)) == []


def test_a_machine_without_tensorrt_leaves_all_but_the_engine(
    package, copy_of, cli, monkeypatch, builder, cannot_build
):
    cannot_build()
    folder = copy_of(package)
    outcome = cli("build", folder, "--target", "tensorrt")
    outcome.refused(
        4, "no CUDA GPU", "all of", "but the engine is written", f"lrq-export build {folder} --target tensorrt"
    )
    verify_hashes(folder)
    assert (folder / "engine/tensorrt/model.onnx").is_file()
    assert list(engines(folder)) == []
    monkeypatch.setattr(tensorrt, "obstacle", lambda target: None)
    assert cli("build", folder, "--target", "tensorrt").code == 0
    assert [target for target, _ in engines(folder)] == ["tensorrt"]


def test_a_package_that_lacks_an_engine_still_is_not_up_to_date(
    package, copy_of, tiny, monkeypatch, builder, cannot_build
):
    """Engine settings build the package itself not anew, and what is missing for an engine is said each time."""
    folder = copy_of(package)

    def again(until="verify", **settings):
        recipe = tiny.recipe().model_copy(update={"engine": Engine(targets=("tensorrt",), **settings)})
        result = build(tiny.source, folder, recipe=recipe, calibration=tiny.calibration, until=until)
        assert result.up_to_date
        return result

    cannot_build()
    assert again("quantize").missing == ()
    for _ in range(2):
        assert [str(lack) for lack in again().missing] == [str(tensorrt.obstacle("tensorrt"))]
    monkeypatch.setattr(tensorrt, "obstacle", lambda target: None)
    assert again().missing == again().missing == ()
    cannot_build()
    (lack,) = again(activations="float16").missing
    assert "stays in use" in str(lack)
    monkeypatch.setattr(tensorrt, "obstacle", lambda target: None)
    assert again(activations="float16").missing == ()
    assert [job["options"]["activations"] for job in builder] == ["float32", "float16"]
    assert build(tiny.source, folder, recipe=tiny.recipe(), calibration=tiny.calibration).up_to_date
    assert list(engines(admit(folder) and folder)) == [("tensorrt", folder / "engine/tensorrt")]


def test_a_provider_of_another_tensorrt_is_told_of_at_build_time(package, copy_of, cli, builder, monkeypatch):
    """The builder here says that it is version 1."""
    folder, command = copy_of(package), ("build", "--target", "tensorrt")
    monkeypatch.setattr(tensorrt, "provider_needs", lambda system: 10)
    told = "warning: tensorrt: ONNX Runtime's TensorRT provider here needs libnvinfer.so.10"
    assert told in cli(*command, folder).out
    assert told in cli(*command, folder).out  # it is there as before
    assert targets.engine_warnings(folder, ["tensorrt-rtx"]) == []
    for paired in (1, None):
        monkeypatch.setattr(tensorrt, "provider_needs", lambda system, needed=paired: needed)
        other = copy_of(package, f"paired{paired}")
        assert cli(*command, other).out == f"{other} holds engines for tensorrt\n"


def test_an_engine_without_weights_is_not_opened(package, copy_of, builder, monkeypatch):
    folder = copy_of(package)
    add_engines(folder, ["tensorrt-rtx"])
    monkeypatch.setattr(tensorrt, "gpu_at_hand", lambda: None)
    for name in ("refit", "strip"):
        (missing,) = add_engines(folder, ["tensorrt-rtx"], changes={name: True})
        assert f"without a CUDA GPU it builds no engine that can be refitted (engine.{name})" in missing.message
        assert "that was built before stays in use" in missing.message
    monkeypatch.setattr(tensorrt, "gpu_at_hand", lambda: "a GPU")
    compared = Target("tensorrt-rtx", folder)  # by verify --against
    assert obstacle(folder, "tensorrt-rtx") is compared.obstacle() is None
    add_engines(folder, ["tensorrt-rtx"], changes={"strip": True})
    told = f"{folder / FOLDER}: the engine has no weights (engine.strip)"
    assert obstacle(folder, "tensorrt-rtx").message == compared.obstacle().message == told


def test_an_engine_that_is_refused_leaves_the_package_as_it_was(package, copy_of, builder, monkeypatch, digests, cli):
    monkeypatch.setattr(tensorrt, "run_worker", lambda job: {"error": "no plugin runs proj_out"})
    folder = copy_of(package)
    before = digests(folder)
    with pytest.raises(CheckFailed, match="tensorrt-rtx: no plugin runs proj_out"):
        add_engines(folder, ["tensorrt-rtx"])
    assert digests(folder) == before
    cli("build", folder, "--target", "tensorrt-rtx").refused(1, "no plugin runs proj_out")


def test_an_engine_stays_until_a_machine_can_build_the_other(
    package, copy_of, cli, digests, monkeypatch, builder, cannot_build
):
    folder, engine = copy_of(package), Path("engine/tensorrt")
    add_engines(folder, ["tensorrt"])
    before = digests(folder / engine)
    cannot_build()
    again = ("build", folder, "--target", "tensorrt")
    for arguments in ((*again, "--set", "engine.activations=float16"), again):
        cli(*arguments).refused(
            4, "no CUDA GPU; the tensorrt engine that was built before stays in use", f"lrq-export build {folder}"
        )
        assert digests(folder / engine) == before
        assert list(engines(admit(folder) and folder)) == [("tensorrt", folder / engine)]
        assert told_settings(folder) == {"activations": {"engine": "float32", "recipe": "float16"}}
        told = "built before: the recipe asks for activations float16, this engine has float32"
        assert told in (folder / "report.html").read_text()
    monkeypatch.setattr(tensorrt, "obstacle", lambda target: None)
    assert cli(*again).code == 0
    assert told_settings(folder) == {}
    assert "built before" not in (folder / "report.html").read_text()
    assert builder[-1]["options"]["activations"] == "float16"
    assert json.loads((folder / engine / "build.json").read_text())["options"]["activations"] == "float16"


def from_the_package(folder, tiny, activations):
    add_engines(folder, ["tensorrt"], changes={"activations": activations})


def from_its_source(folder, tiny, activations):
    recipe = tiny.recipe().model_copy(update={"engine": Engine(targets=("tensorrt",), activations=activations)})
    assert build(tiny.source, folder, recipe=recipe, calibration=tiny.calibration).up_to_date


@pytest.mark.parametrize("ask", [from_the_package, from_its_source])
def test_a_setting_that_is_taken_back_is_waited_for_no_more(
    package, copy_of, tiny, digests, builder, cannot_build, ask
):
    folder = copy_of(package)
    ask(folder, tiny, "float32")
    before = digests(folder)
    cannot_build()
    ask(folder, tiny, "float16")
    assert told_settings(folder) == {"activations": {"engine": "float32", "recipe": "float16"}}
    ask(folder, tiny, "float32")
    assert told_settings(folder) == {}
    assert digests(folder) == before  # recipe, manifest, report and page, too
    assert len(builder) == 1


def test_a_whole_build_for_onnx_runtime_leaves_the_settings_of_other_engines(package, copy_of, tiny, digests, builder):
    folder = copy_of(package)
    from_the_package(folder, tiny, "float16")
    before = digests(folder)
    assert build(tiny.source, folder, recipe=tiny.recipe(), calibration=tiny.calibration).up_to_date
    assert digests(folder) == before


def told_settings(folder):
    """What the report says that the engine has and the recipe does not ask for."""
    report = json.loads((folder / "report.json").read_text())
    assert report["recipe"] == load_manifest(folder)["recipe"]
    (row,) = (row for row in report["engines"] if row["target"] == "tensorrt")
    return row["other_settings"]


@pytest.fixture
def lacking(monkeypatch, tmp_path):
    """Whether an engine with these facts in its build.json is built again on a machine."""

    def ask(target, facts, *, library="1", gpu=None, compiled=False, **changes):
        monkeypatch.setattr(targets, "installed_tensorrt", lambda *_: library)
        monkeypatch.setattr(tensorrt, "gpu_at_hand", lambda: gpu)
        monkeypatch.setattr(tensorrt, "find_library", lambda: tmp_path if compiled else None)
        place = tmp_path / FOLDERS[target]
        place.mkdir(parents=True, exist_ok=True)
        built = {"target": target, "version": "1", "plugins": False, "gpu": "H100"}
        (place / "build.json").write_text(json.dumps(built | facts))
        return bool(targets.lacking(tmp_path, Engine(targets=(target,), **changes)))

    return ask


def test_an_engine_of_another_version_of_its_library_is_built_again(lacking):
    for target in ("tensorrt", "tensorrt-rtx"):
        assert lacking(target, {}, library="2")
        assert not lacking(target, {}, library="1")
        assert not lacking(target, {}, library=None)  # nothing here refuses it, or could build another


def test_an_engine_for_another_gpu_is_built_again_unless_it_is_for_several(lacking):
    several = {"hardware": "ampere_plus"}
    assert lacking("tensorrt", {}, gpu="L40S")
    assert not lacking("tensorrt", {}, gpu="H100")
    assert not lacking("tensorrt", {}, gpu=None)
    assert not lacking("tensorrt", {"options": several}, gpu="L40S", **several)
    assert not lacking("tensorrt-rtx", {"gpu": None}, gpu="L40S")


def test_plugins_that_were_compiled_since_are_used(lacking):
    assert lacking("tensorrt-rtx", {}, compiled=True)
    assert not lacking("tensorrt-rtx", {"plugins": True}, compiled=True)
    assert not lacking("tensorrt-rtx", {"plugins": True}, compiled=False)  # no reason to lose them
    assert not lacking("tensorrt-rtx", {"options": {"plugins": "never"}}, compiled=True, plugins="never")


def test_what_tensorrt_measured_is_there_for_the_next_build(package, copy_of, builder, monkeypatch, reseal):
    folder = copy_of(package)
    add_engines(folder, ["tensorrt"])
    (folder / "engine/tensorrt/timing.cache").write_bytes(b"measured")
    reseal(folder)
    found, worker = [], tensorrt.run_worker
    monkeypatch.setattr(
        tensorrt, "run_worker", lambda job: [found.append(Path(job["timing_cache"]).read_bytes()), worker(job)][1]
    )
    add_engines(folder, ["tensorrt"], changes={"optimization": 5})
    assert found == [b"measured"]


def test_a_run_that_was_killed_after_an_engine_mixes_it_with_none(package, copy_of, builder, monkeypatch, tmp_path):
    """An engine with plugins has a network for ONNX Runtime's provider; the one in its place has none."""
    folder, changes = copy_of(package), {"plugins": "never"}
    monkeypatch.setattr(tensorrt, "find_library", lambda: tmp_path / "liblrq_plugins.so")
    add_engines(folder, ["tensorrt"])
    seal = targets.seal
    monkeypatch.setattr(targets, "seal", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_engines(folder, ["tensorrt"], changes=changes)
    monkeypatch.setattr(targets, "seal", seal)
    assert add_engines(folder, ["tensorrt"], changes=changes) == []
    assert len(builder) == 2
    assert {path.name for path in (folder / "engine/tensorrt").iterdir()} == {
        "model.onnx", "model.plan", "build.json", "model_ctx.onnx"
    }  # fmt: skip


REFUSED = {
    "no target": ([], "is built already", "--target"),
    "a flag of whole builds": (["--target", "tensorrt-rtx", "--preset", "w3a8"], "--preset", "build again"),
    "a key of whole builds": (
        ["--target", "tensorrt-rtx", "--set", "weights.bits=3"], "--set weights.bits", "build again"),
    "no such target": (["--target", "onnx"], "engine.targets", "'onnxruntime', 'tensorrt' or 'tensorrt-rtx'"),
    "no such axis": (
        ["--target", "tensorrt-rtx", "--set", 'engine.profiles=["depth=3"]'], "an axis of this model", ""),
    "another folder": (["--target", "tensorrt-rtx", "-o", "other"], "is a package itself", "leave -o out"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_finished_package_does_not_take_is_refused(
    package, copy_of, cli, digests, builder, arguments, said, hint
):
    folder = copy_of(package)
    before = digests(folder)
    cli("build", folder, *arguments).refused(2, said, hint)
    assert digests(folder) == before


def test_a_folder_that_is_no_package_needs_an_output(tiny, cli):
    cli("build", tiny.source, "--target", "tensorrt-rtx").refused(2, "is no package", "-o OUT")


def test_a_link_that_the_disk_refuses_is_a_copy(package, copy_of, builder, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(targets.os, "link", refuse)
    folder = copy_of(package)
    add_engines(folder, ["tensorrt-rtx"])
    verify_hashes(folder)
