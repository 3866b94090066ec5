"""A stopped build goes on where it was and ends with the bytes of an undisturbed one."""

import random
import signal

import check_resume
import pytest

from lrq_export.compiler import STAGES, build
from lrq_export.package import save_tensors_atomic


class Spy:
    """Progress that remembers which stages had work to do."""

    def __init__(self):
        self.stages = []

    def begin(self, stage, total):
        self.stages.append(stage)

    def advance(self, what=""):
        pass

    def end(self, stage, seconds):
        pass


@pytest.fixture(scope="module")
def story(tiny, tmp_path_factory):
    """One build: interrupted and killed while tracing, stopped after the rewrite, killed while quantizing, finished."""
    out = tmp_path_factory.mktemp("resume") / "package"
    randomly, told = random.Random(), {"out": out, "work": Spy(), "more": Spy()}

    def stop_in(stage, sent, within):
        started = check_resume.Build(tiny.source, out, tiny.arguments)
        started.wait_for(stage)
        with pytest.raises(check_resume.subprocess.TimeoutExpired):
            started.wait(randomly.uniform(0, within))
        return started.stop(sent), started.errors

    told["interrupted"] = stop_in("trace", signal.SIGINT, 2)
    told["after interruption"] = sorted(path.name for path in out.parent.iterdir())
    told["killed tracing"] = stop_in("trace", signal.SIGKILL, 3)
    inputs = {"recipe": tiny.recipe(), "calibration": tiny.calibration}
    told["stopped"] = build(tiny.source, out, **inputs, until="rewrite", progress=told["work"])
    told["after stopping"] = sorted(path.name for path in out.parent.iterdir())
    told["killed quantizing"] = stop_in("quantize", signal.SIGKILL, 1)
    told["finished"] = build(tiny.source, out, **inputs, progress=told["more"])
    return told


def test_control_c_exits_5_with_one_line_and_keeps_the_work(story):
    code, errors = story["interrupted"]
    assert code == 5
    assert errors == "lrq-export: interrupted. Fix: run the same command again to resume\n"
    assert story["after interruption"] == ["package.partial"]


def test_a_kill_leaves_no_package(story):
    assert story["killed tracing"] == (-signal.SIGKILL, "")
    assert story["after stopping"] == ["package.partial"]
    assert story["killed quantizing"] == (-signal.SIGKILL, "")


def test_until_stops_after_its_stage(story):
    assert story["stopped"].stopped_after == "rewrite"
    assert story["stopped"].report is None
    assert story["work"].stages == ["load", "trace", "rewrite"]  # calibration was done before the interruption


def test_finished_stages_are_not_done_again(story):
    assert story["more"].stages == ["load", "quantize", "bind", "engine", "verify"]


def test_a_disturbed_build_ends_with_the_bytes_of_an_undisturbed_one(story, package):
    assert story["finished"].passed
    assert check_resume.differing(check_resume.lasting_bytes(story["out"]), check_resume.lasting_bytes(package)) == []
    assert check_resume.leftovers(story["out"]) == []


def test_a_difference_of_bytes_is_seen(package, copy_of):
    edited = copy_of(package)
    needed = check_resume.lasting_bytes(package)
    assert check_resume.differing(check_resume.lasting_bytes(edited), needed) == []
    (edited / "stats.safetensors").write_bytes(b"x")
    (edited / "more").write_bytes(b"x")
    (edited / "recipe.toml").unlink()
    assert check_resume.differing(check_resume.lasting_bytes(edited), needed) == [
        "more", "recipe.toml", "stats.safetensors"]  # fmt: skip


def test_work_of_another_recipe_is_not_resumed(tiny, tmp_path):
    inputs = {"calibration": tiny.calibration, "until": "calibrate"}
    out = tmp_path / "package"
    first = build(tiny.source, out, recipe=tiny.recipe(), **inputs).out
    (first / "graphs").mkdir()
    (first / "graphs" / "0-trace.onnx").write_bytes(b"half")
    build(tiny.source, out, recipe=tiny.recipe(rotation__signs="true"), **inputs)
    assert not (first / "graphs").exists()


def test_until_a_stage_is_resumed_by_any_later_one(tiny, tmp_path):
    out, spies = tmp_path / "package", [Spy(), Spy(), Spy()]
    for until, spy in zip(("load", "calibrate", "calibrate"), spies, strict=True):
        build(tiny.source, out, recipe=tiny.recipe(), calibration=tiny.calibration, until=until, progress=spy)
    assert [spy.stages for spy in spies] == [["load"], ["load", "calibrate"], ["load"]]


def test_every_input_decides_the_fingerprint(tiny, tmp_path, tiny_calibration, copy_of):
    import torch

    source = copy_of(tiny.source)
    out = tmp_path / "package"

    def work_starts_afresh(source, recipe, calibration, conditions=None):
        spy = Spy()
        build(
            source, out, recipe=recipe, calibration=calibration, conditions=conditions, until="calibrate", progress=spy
        )
        return "calibrate" in spy.stages

    base = (source, tiny.recipe(), tiny.calibration)
    assert work_starts_afresh(*base)
    assert not work_starts_afresh(*base)
    other = tiny_calibration(tmp_path / "other.safetensors", rows=15)
    conditions = tmp_path / "conditions.safetensors"
    save_tensors_atomic(conditions, {"encoder_hidden_states": torch.ones(3, 6, 16)})
    assert work_starts_afresh(source, tiny.recipe(), other)
    assert work_starts_afresh(source, tiny.recipe(sampling__seed="9"), tiny.calibration)
    assert work_starts_afresh(*base, conditions)
    scheduler = source / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("1000", "900"))
    assert work_starts_afresh(*base)


def test_stages_are_those_of_the_design():
    assert STAGES == ("load", "calibrate", "trace", "rewrite", "quantize", "engine", "verify")


def test_a_kill_while_calibration_is_written_is_resumed(tiny, tmp_path, monkeypatch):
    """Whatever file is the last that was written, the next run finds the others or makes them again."""
    from lrq_export.calibrate.tokens import TokenSample

    def killed(*arguments):
        raise KeyboardInterrupt

    out = tmp_path / "package"
    with monkeypatch.context() as patched:
        patched.setattr(TokenSample, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            build(tiny.source, out, recipe=tiny.recipe(), calibration=tiny.calibration, until="calibrate")
    assert build(tiny.source, out, recipe=tiny.recipe(), calibration=tiny.calibration, until="trace")
