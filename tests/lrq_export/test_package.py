import errno
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lrq_export import package
from lrq_export.checkpoint import TensorFile
from lrq_export.errors import InputError, MissingError, UsageError
from lrq_export.workspace import open_workspace

ROOT = Path(package.__file__).parents[1]


class Killed(BaseException):
    """Stands for anything that stops a build."""


def _fill(folder, content=b"one"):
    """A small package in `folder`, sealed."""
    (folder / "engine/onnxruntime").mkdir(parents=True, exist_ok=True)
    package.write_bytes_atomic(folder / package.MODEL, content)
    package.write_bytes_atomic(folder / "engine/onnxruntime/model.onnx", content * 2)
    package.write_json_atomic(folder / package.REPORT, {"seconds": 1.5})
    package.write_manifest(folder, {"recipe": {"bits": 4}})


def _build(out, content=b"one", fingerprint=None):
    with open_workspace(out, fingerprint or content.decode()) as workspace:
        package.write_bytes_atomic(workspace.layers / "codes", content)
        _fill(workspace.path, content)
        workspace.commit()


def _refused(call, kind, *parts):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.hint
    for part in parts:
        assert str(part) in message
    return message


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- single files


def test_a_file_appears_whole_with_the_usual_permissions(tmp_path):
    path = tmp_path / "new" / "file"
    with package.atomic_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert _names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    package.write_bytes_atomic(path, b"old")
    with pytest.raises(type(error)), package.atomic_file(path) as file:  # noqa: PT012
        file.write(b"new")
        raise error
    assert (path.read_bytes(), _names(tmp_path)) == (b"old", ["file"])


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("code", sorted(package.DISK_ERRORS))
def test_a_full_disk_is_one_line_with_exit_code_4(tmp_path, monkeypatch, name, code):
    path = tmp_path / "file"
    package.write_bytes_atomic(path, b"old")

    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, full)
    message = _refused(lambda: package.write_bytes_atomic(path, b"x" * 1234), MissingError, path, "at least 1234 bytes")
    assert "free bytes" in message
    assert MissingError.exit_code == 4
    assert (path.read_bytes(), _names(tmp_path)) == (b"old", ["file"])


def test_a_real_file_size_limit_is_reported(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code = (
        "import sys, pathlib\n"
        "from lrq_export import errors, package\n"
        "try: package.write_bytes_atomic(pathlib.Path(sys.argv[1]), bytes(200_000))\n"
        "except errors.MissingError as error: print(error); sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert "File too large" in done.stdout
    assert "at least 200000 bytes" in done.stdout
    assert _names(tmp_path) == []


def test_json_has_one_spelling_and_no_nan(tmp_path):
    package.write_json_atomic(tmp_path / "a", {"b": 1, "a": "ä"})
    assert (tmp_path / "a").read_text("utf-8") == '{\n  "a": "ä",\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        package.write_json_atomic(tmp_path / "a", {"a": float("nan")})


def test_tensor_files_are_deterministic_and_read_by_safetensors(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "codes": torch.arange(-3, 4, dtype=torch.int8),
        "view": torch.arange(12.0).reshape(3, 4).T,
        "scalar": torch.tensor(7, dtype=torch.int64),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "ümlaut": torch.ones(1, dtype=torch.float64),
    }
    metadata = {f"key{index}": str(index) for index in range(20)}
    package.save_tensors_atomic(tmp_path / "a", tensors, metadata)
    reordered = dict(reversed(metadata.items()))
    package.save_tensors_atomic(tmp_path / "b", dict(reversed(tensors.items())), reordered)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded, ours = load_file(tmp_path / "a"), TensorFile(tmp_path / "a")
    assert ours.metadata == metadata
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(ours.read(name), tensor)


def test_free_disk_is_required_before_it_is_needed(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 4, 6))
    package.require_free_disk(tmp_path / "not" / "yet", 6)
    _refused(lambda: package.require_free_disk(tmp_path / "not", 7), MissingError, "got 6 free bytes", "needed 7")


# --- the manifest


def test_a_sealed_package_verifies(tmp_path):
    _fill(tmp_path)
    manifest = package.verify_hashes(tmp_path)
    assert manifest == package.load_manifest(tmp_path)
    assert list(manifest["files"]) == ["engine/onnxruntime/model.onnx", "model.onnx", "report.json"]
    assert manifest["recipe"] == {"bits": 4}


def test_timings_change_the_manifest_but_not_the_content_digest(tmp_path):
    for name, seconds, content in (("a", 1.0, b"x"), ("b", 2.0, b"x"), ("c", 1.0, b"y")):
        package.write_bytes_atomic(tmp_path / name / package.MODEL, content)
        package.write_json_atomic(tmp_path / name / package.REPORT, {"seconds": seconds})
        package.write_manifest(tmp_path / name, {})
    digests = [package.verify_hashes(tmp_path / name)["content_sha256"] for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_edited_byte_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("package")
    _fill(folder)
    path = folder / data.draw(st.sampled_from(package.list_files(folder)))
    content = bytearray(path.read_bytes())
    index = data.draw(st.integers(0, len(content) - 1))
    content[index] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    _refused(lambda: package.verify_hashes(folder), InputError, path.name)


def test_edited_missing_and_added_files_are_named(tmp_path):
    _fill(tmp_path)
    model = tmp_path / package.MODEL
    model.write_bytes(b"two")
    got, needed = package.sha256_file(model)[:12], package.load_manifest(tmp_path)["files"]["model.onnx"]["sha256"][:12]
    message = _refused(lambda: package.verify_hashes(tmp_path), InputError, model, f"got sha256 {got}, needed {needed}")
    assert "was edited" in message
    model.write_bytes(b"four")
    _refused(lambda: package.verify_hashes(tmp_path), InputError, model, "got 4 bytes, needed 3")
    model.unlink()
    _refused(lambda: package.verify_hashes(tmp_path), InputError, model, "is missing")
    model.write_bytes(b"one")
    (tmp_path / "engine" / "extra").touch()
    _refused(lambda: package.verify_hashes(tmp_path), InputError, "engine/extra", "does not belong")
    (tmp_path / "engine" / "extra").unlink()
    model.unlink()
    model.symlink_to("/etc/passwd")
    _refused(lambda: package.verify_hashes(tmp_path), InputError, model, "link")


def _reseal(folder, **changes):
    manifest = {**package.load_manifest(folder), **changes}
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = package._seal(manifest)
    package.write_json_atomic(folder / package.MANIFEST, manifest)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a\\b"])
def test_a_hostile_manifest_leads_nowhere(tmp_path, name):
    _fill(tmp_path / "package")
    _reseal(tmp_path / "package", files={name: {"sha256": "0", "bytes": 3}})
    _refused(lambda: package.verify_hashes(tmp_path / "package"), InputError, repr(name), "inside the package")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"files": []}, "files: got list"),
        ({"files": {"a": 3}}, "files: a: needed sha256 and bytes"),
        ({"files": {"a": {"sha256": "0", "bytes": "3"}}}, "files: a: needed sha256 and bytes"),
        ({"schema": 99}, "got schema 99, needed 1"),
        ({"format": "other"}, "needed an lrq-export package"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, changes, part):
    _fill(tmp_path)
    _reseal(tmp_path, **changes)
    _refused(lambda: package.load_manifest(tmp_path), InputError, part)


def test_a_folder_without_a_manifest_is_no_package(tmp_path):
    _refused(lambda: package.load_manifest(tmp_path / "x"), InputError, "not an lrq-export package", "lrq-export build")
    for unfinished in ("out.partial", "out.partial/package"):
        (tmp_path / unfinished).mkdir()
        _refused(
            lambda at=unfinished: package.load_manifest(tmp_path / at), InputError, "out.partial", "without --until"
        )
    (tmp_path / "x.previous").mkdir()
    _refused(lambda: package.load_manifest(tmp_path / "x"), InputError, "restores", "x.previous")
    (tmp_path / package.MANIFEST).write_text("{")
    _refused(lambda: package.load_manifest(tmp_path), InputError, "not valid JSON")


def test_facts_cannot_take_the_manifests_own_names(tmp_path):
    with pytest.raises(ValueError, match="files"):
        package.write_manifest(tmp_path, {"files": {}})


# --- the workspace


@pytest.mark.parametrize("before", ["nothing", "empty", "package"])
def test_a_commit_leaves_the_package_and_nothing_else(tmp_path, before):
    out = tmp_path / "deep" / "out"
    if before == "empty":
        out.mkdir(parents=True)
    if before == "package":
        _build(out, b"old")
    _build(out, b"new")
    package.verify_hashes(out)
    assert _names(out.parent) == ["out"]
    assert (out / package.MODEL).read_bytes() == b"new"
    assert _names(out) == ["engine", "manifest.json", "model.onnx", "report.json"]


def test_work_is_resumed_for_the_same_fingerprint_only(tmp_path):
    out = tmp_path / "out"
    with open_workspace(out, "a") as workspace:
        assert _names(workspace.path) == []
        (workspace.path / "codes").write_bytes(b"layer 1")
        package.write_bytes_atomic(workspace.layers / "1", b"layer 1")
        (workspace.path / f".stats.1{package.TEMPORARY}").touch()
    with open_workspace(out, "a") as workspace:
        assert (_names(workspace.path), _names(workspace.layers)) == (["codes"], ["1"])
    with open_workspace(out, "b") as workspace:
        assert _names(workspace.path) == []
        assert not workspace.layers.exists()


def test_damaged_state_starts_over(tmp_path):
    with open_workspace(tmp_path / "out", "a") as workspace:
        (workspace.path / "codes").touch()
    (tmp_path / "out.partial" / "state.json").write_text("{")
    with open_workspace(tmp_path / "out", "a") as workspace:
        assert _names(workspace.path) == []


def test_what_is_not_ours_is_never_touched(tmp_path):
    def refuse(*parts):
        _refused(lambda: open_workspace(tmp_path / "out", "a"), UsageError, *parts)

    (tmp_path / "out").write_text("thesis")
    refuse("got a file")
    (tmp_path / "out").unlink()
    for name in ("out", "out.partial", "out.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
        refuse(tmp_path / name, "thesis.txt")
        assert (tmp_path / name / "thesis.txt").read_text() == "mine"
        shutil.rmtree(tmp_path / name)
    (tmp_path / "out.partial").write_text("mine")
    refuse("out.partial: got a file or a link")
    assert UsageError.exit_code == 2
    _refused(lambda: open_workspace(Path("/"), "a"), UsageError, "mount point")


def test_what_was_put_into_out_during_the_build_is_not_replaced(tmp_path):
    with open_workspace(tmp_path / "out", "a") as workspace:
        _fill(workspace.path)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        _refused(workspace.commit, UsageError, "thesis.txt")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_unwritable_place_is_a_usage_error(tmp_path):
    (tmp_path / "file").touch()
    _refused(lambda: open_workspace(tmp_path / "file" / "out", "a"), UsageError, "cannot write")


def test_two_builds_of_one_folder_do_not_meet(tmp_path):
    with open_workspace(tmp_path / "out", "a") as first:
        (first.path / "codes").touch()
        _refused(lambda: open_workspace(tmp_path / "out", "b"), UsageError, "another build")
        _refused(lambda: open_workspace(tmp_path / "out", "a"), UsageError, "another build")
        assert (first.path / "codes").exists()
        with open_workspace(tmp_path / "other", "a"):
            pass
    open_workspace(tmp_path / "out", "a").close()


def test_a_link_to_a_folder_is_built_where_it_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    _build(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    package.verify_hashes(tmp_path / "disk")


# --- stopped at any step: every call that changes the disk counts as one

STEPS = [(os, name) for name in ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir")]


@pytest.fixture
def _quick_fsync(monkeypatch):
    """These tests build hundreds of packages; a flush still counts as a step, but no disk is waited for."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _stop_at(step, stop):
    """Patches (module, name, replacement) that call `stop` in place of the step-th change of the disk."""
    count = iter(range(10**9))

    def counted(original):
        def call(*args, **kwargs):
            if next(count) == step:
                stop()
            return original(*args, **kwargs)

        return call

    return [(module, name, counted(getattr(module, name))) for module, name in STEPS]


def _stopped_by_exception(monkeypatch, step, build):
    """Whether `build` was stopped before its end."""

    def stop():
        raise Killed

    with monkeypatch.context() as patch:
        for module, name, replacement in _stop_at(step, stop):
            patch.setattr(module, name, replacement)
        try:
            build()
        except Killed:
            return True
        return False


def _stopped_by_kill(_, step, build):
    """Likewise, in a child that ends without running any clean-up, as under SIGKILL."""
    child = os.fork()
    if child == 0:
        for module, name, replacement in _stop_at(step, lambda: os._exit(9)):
            setattr(module, name, replacement)
        try:
            build()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.usefixtures("_quick_fsync")
@pytest.mark.parametrize("stopped", [_stopped_by_exception, _stopped_by_kill])
def test_a_build_stopped_at_any_step_leaves_one_whole_package(tmp_path, monkeypatch, stopped):
    for step in range(200):
        out = tmp_path / str(step) / "out"
        _build(out, b"old")
        if not stopped(monkeypatch, step, lambda out=out: _build(out, b"new")):
            break
        whole = next(folder for folder in (out, out.with_name(out.name + ".previous")) if folder.exists())
        assert (whole / package.MODEL).read_bytes() in (b"old", b"new")
        package.verify_hashes(whole)
        with open_workspace(out, "third"):  # opening restores OUT, whatever is built then
            package.verify_hashes(out)
        _build(out, b"new")
        package.verify_hashes(out)
        assert (out / package.MODEL).read_bytes() == b"new"
        assert _names(out.parent) == ["out"]
    assert 20 < step < 199  # every step had its turn, and there were some


@pytest.mark.usefixtures("_quick_fsync")
def test_a_resumed_build_ends_with_the_bytes_of_an_unbroken_one(tmp_path, monkeypatch):
    _build(tmp_path / "unbroken", b"new")
    needed = package.load_manifest(tmp_path / "unbroken")
    for step in range(0, 40, 3):
        out = tmp_path / str(step) / "out"
        _stopped_by_exception(monkeypatch, step, lambda out=out: _build(out, b"new"))
        _build(out, b"new")
        assert package.load_manifest(out) == needed


def test_a_disk_that_is_full_when_work_begins_says_so(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", full)
    _refused(lambda: open_workspace(tmp_path / "out", "a"), MissingError, "No space left", "free bytes")
