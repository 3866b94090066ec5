"""A package that is built anew in the place of another one keeps its engines, where they are of the same model."""

from types import SimpleNamespace

import pytest

from lrq_export import compiler
from lrq_export.engine import targets, tensorrt
from lrq_export.engine.targets import add_engines, engines
from lrq_export.package import load_manifest, verify_hashes
from lrq_export.progress import Silent
from lrq_export.recipe import Engine, load_recipe
from lrq_export.verify import report_engines


@pytest.fixture
def rebuilt(package, copy_of, reseal, builder, tmp_path):
    """A package with an engine, what is to replace it at the end of a whole build, and the build's stage `engine`."""
    folder = copy_of(package)
    add_engines(folder, ["tensorrt"])
    (folder / "engine/tensorrt/timing.cache").write_bytes(b"measured")
    reseal(folder)
    fresh = copy_of(package, "fresh")
    (fresh / "manifest.json").unlink()

    def stage(**settings):
        recipe = load_recipe().model_copy(update={"engine": Engine(**settings)})
        source = SimpleNamespace(config=load_manifest(package)["source"]["config"])
        workspace = SimpleNamespace(out=folder, layers=tmp_path / "layers")
        workspace.layers.mkdir(exist_ok=True)
        job = SimpleNamespace(
            path=fresh, recipe=recipe, workspace=workspace, source=source, progress=Silent(), timings={}, missing=[],
            inputs_fingerprint=load_manifest(package)[targets.INPUTS],
        )  # fmt: skip
        compiler._engine(job)
        return job.missing

    return folder, fresh, stage


@pytest.mark.parametrize("asked", [{"targets": ("tensorrt",), "intra_op_threads": 2}, {"intra_op_threads": 2}])
def test_a_whole_build_of_the_same_model_keeps_the_engines(rebuilt, digests, cannot_build, asked):
    """Other threads, or another version of a library, make a package anew, on a machine that may lack the GPU."""
    folder, fresh, stage = rebuilt
    cannot_build()
    assert stage(**asked) == stage(**asked) == []
    assert digests(fresh / "engine/tensorrt") == digests(folder / "engine/tensorrt")


def test_a_kept_engine_that_the_recipe_wants_otherwise_stays_until_it_can_be_built(
    rebuilt, digests, builder, cannot_build, monkeypatch
):
    folder, fresh, stage = rebuilt
    cannot_build()
    (lack,) = stage(targets=("tensorrt",), activations="float16")
    assert "stays in use" in str(lack)
    assert digests(fresh / "engine/tensorrt") == digests(folder / "engine/tensorrt")
    monkeypatch.setattr(tensorrt, "obstacle", lambda target: None)
    assert stage(targets=("tensorrt",), activations="float16") == []
    assert [job["options"]["activations"] for job in builder] == ["float32", "float16"]
    assert verify_hashes(folder)  # what was linked to it is as it was


def test_an_engine_of_weights_that_were_rounded_otherwise_stays_until_it_can_be_built(
    rebuilt, digests, builder, cannot_build, monkeypatch
):
    """As other threads do, which add up in another order."""
    folder, fresh, stage = rebuilt
    weights = bytearray((fresh / "quantized.safetensors").read_bytes())
    weights[-1] ^= 1
    (fresh / "quantized.safetensors").write_bytes(weights)
    cannot_build()
    for _ in range(2):
        (lack,) = stage(targets=("tensorrt",))
        assert "stays in use" in str(lack)
    before, after = digests(folder / "engine/tensorrt"), digests(fresh / "engine/tensorrt")
    assert {name for name in before if before[name] != after[name]} == {"build.json"}
    told = "built before: an earlier build of the same inputs made its weights"
    assert state(fresh) == told
    assert state(folder) == "built"
    monkeypatch.setattr(tensorrt, "obstacle", lambda target: None)
    assert stage(targets=("tensorrt",)) == []
    assert state(fresh) == "built"
    assert len(builder) == 2


def state(folder):
    """What the report says of the state of the TensorRT engine."""
    return report_engines._state(report_engines.engine_rows(folder, 1, Engine())[1])


def test_an_engine_of_other_inputs_is_not_kept(rebuilt):
    """The twin: it would be kept but for that."""
    folder, fresh, _ = rebuilt
    targets.keep_engines(folder, fresh, fresh.parent, "of another source")
    assert list(engines(fresh)) == []
    targets.keep_engines(folder, fresh, fresh.parent, load_manifest(folder)[targets.INPUTS])
    assert [target for target, _ in engines(fresh)] == ["tensorrt"]


def test_an_engine_of_an_edited_package_is_not_kept(rebuilt):
    folder, fresh, stage = rebuilt
    (folder / "engine/tensorrt/model.plan").write_bytes(b"ftrt another")
    assert stage() == []
    assert list(engines(fresh)) == []


def test_the_fingerprint_of_inputs_is_that_of_no_version_and_no_engine(tiny, package, monkeypatch, tmp_path):
    """It is in the manifest, and a build with other versions and engine settings would write the same."""
    seen = []
    monkeypatch.setattr(compiler, "versions", lambda: {"torch": "of another day"})
    monkeypatch.setattr(compiler, "_run", lambda job, until, key: seen.append((job.inputs_fingerprint, key)))
    manifest, other = load_manifest(package), tmp_path / "another"
    for changed in ({"engine": Engine(intra_op_threads=2)}, {"keep": ("*.to_q",)}):
        recipe = tiny.recipe().model_copy(update=changed)
        compiler.build(tiny.source, other, recipe=recipe, calibration=tiny.calibration)
    (same, key), (different, _) = seen
    assert same == manifest[targets.INPUTS] != different
    assert key != manifest["fingerprint"]
