"""Hostile packages: a table of them, each refused with one line, quickly, in little memory, before torch is loaded."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_packages import ENGINE, HOSTILE, MODEL, QUANTIZED, TENSORRT_RTX, flip, plan_and_facts, put, varint

from lrq_export import admit as admission
from lrq_export import package as packages
from lrq_export.admit import _check_files, admit
from lrq_export.engine.onnxruntime import open_session
from lrq_export.errors import InputError
from lrq_export.onnx_scan import check_model_file
from lrq_export.tensor_header import read_header

ROOT = Path(packages.__file__).parents[1]
MOST_SECONDS, MOST_BYTES = 5.0, 256 << 20

CHILD = """
import json, sys, time
from lrq_export.admit import admit
from lrq_export.errors import LrqError
def peak(): # of this program alone: what getrusage says, a child has from its parent
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"imports": peak()}))
for path in sys.stdin.read().split("\\0"):
    began, outcome = time.process_time(), (0, "admitted")  # of this process: the tests share the machine
    try:
        admit(path)
    except LrqError as error:
        outcome = error.exit_code, str(error)
    print(json.dumps({"code": outcome[0], "line": outcome[1], "seconds": time.process_time() - began, "peak": peak()}))
print(json.dumps({"heavy": [name for name in ("torch", "onnx", "onnxruntime", "numpy") if name in sys.modules]}))
"""


@pytest.fixture(scope="module")
def judged(package, tmp_path_factory):
    """Every hostile package, and the sound one, before the same check in a process of its own."""
    import shutil

    folder = tmp_path_factory.mktemp("hostile")
    paths = {"sound": package}
    for index, (name, (edit, _)) in enumerate(HOSTILE.items()):
        paths[name] = Path(shutil.copytree(package, folder / str(index)))
        edit(paths[name])
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input="\0".join(map(str, paths.values())),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *verdicts, last = map(json.loads, done.stdout.splitlines())
    return first | last | {"verdicts": dict(zip(paths, verdicts, strict=True)), "paths": paths}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_package_is_refused(judged, name):
    verdict = judged["verdicts"][name]
    assert verdict["code"] == 3, verdict
    assert HOSTILE[name][1] in verdict["line"], verdict["line"]
    assert "Fix: " in verdict["line"]
    assert verdict["line"].isprintable()
    assert len(verdict["line"]) < 4500
    assert verdict["seconds"] < MOST_SECONDS


def test_the_memory_of_a_scan_does_not_grow_with_the_file(tmp_path):
    """Sixty thousand weights, 780 MB of holes."""
    path, size, count = tmp_path / "model.onnx", 13_000, 60_000
    weight = b"\x08" + varint(size) + b"\x10\x03\x4a" + varint(size)  # dims, INT8, raw data
    entry = b"\x2a" + varint(len(weight) + size) + weight
    with open(path, "wb") as file:
        file.write(b"\x3a" + varint((len(entry) + size) * count))
        for _ in range(count):
            file.write(entry)
            file.seek(size, os.SEEK_CUR)
        file.truncate(file.tell())
    assert peak_of_a_scan(path) < MOST_BYTES


def test_the_memory_of_a_scan_does_not_grow_with_a_name(tmp_path):
    """Of an operator, 300 MB of holes."""
    path, size = tmp_path / "model.onnx", 300 << 20
    node = b"\x22" + varint(size)
    entry = b"\x0a" + varint(len(node) + size) + node
    with open(path, "wb") as file:
        file.write(b"\x3a" + varint(len(entry) + size) + entry)
        file.truncate(file.tell() + size)
    assert peak_of_a_scan(path) < MOST_BYTES


def peak_of_a_scan(path):
    code = (
        "import sys; from pathlib import Path; from lrq_export.onnx_scan import check_model_file\n"
        "check_model_file(Path(sys.argv[1]), ())\n"
        'print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))'
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


def test_tensors_are_counted_over_all_files(package, copy_of, monkeypatch):
    """With the fields of models, for both take time."""
    folder = copy_of(package)
    headers = [read_header(path) for path in folder.rglob("*.safetensors")]
    entries = sum(len(metadata) + len(tensors) for metadata, tensors in headers)
    fields = sum(
        check_model_file(path, {each.name for each in path.parent.iterdir()}) for path in folder.rglob("*.onnx")
    )
    axes = sum(len(entry.shape) for _, tensors in headers for entry in tensors.values())
    whole = fields + admission.FIELDS_OF_AN_ENTRY * entries + axes
    monkeypatch.setattr(admission, "MOST_OF_ALL", whole)
    admit(folder)
    monkeypatch.setattr(admission, "_admitted", set())
    monkeypatch.setattr(admission, "MOST_OF_ALL", whole - 1)
    with pytest.raises(InputError, match="more tensors and metadata"):
        admit(folder)


@pytest.mark.parametrize("version", ["1.7.1.116", "1.7.1", "1.7.1.372"])
def test_a_plan_of_the_version_that_its_facts_tell_is_admitted(package, copy_of, version):
    """The twin; a byte holds a number modulo 256, and a version may be told in fewer numbers."""
    folder = copy_of(package)
    plan_and_facts(TENSORRT_RTX, version=version, engine_bytes=len(TENSORRT_RTX))(folder)
    assert "engine/tensorrt-rtx/model.plan" in admit(folder)["files"]


def test_a_plan_of_a_layout_that_is_not_known_is_left_to_its_library(package, copy_of):
    folder = copy_of(package)
    plan_and_facts(TENSORRT_RTX[:4] + b"\1" + TENSORRT_RTX[5:], version="9.9")(folder)
    admit(folder)


def test_a_sound_package_is_admitted(judged):
    assert judged["verdicts"]["sound"]["code"] == 0


def test_refusing_takes_little_memory_and_no_heavy_import(judged):
    peak = max(verdict["peak"] for verdict in judged["verdicts"].values())
    assert peak < MOST_BYTES, f"{peak:,} bytes, {judged['imports']:,} of them for imports"
    assert judged["heavy"] == []


COMMANDS = [
    ["verify"], ["verify", "--against", "onnxruntime"], ["inspect", "--layers"], ["sample", "-o", "x.safetensors"],
    ["report", "-o", "x.html"], ["serve"], ["serve-config", "--triton", "x"], ["bench"],
    ["build", "--target", "tensorrt"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "name", ["a flipped byte", "data above the package", "a pipe as manifest", "a zip as manifest", "no manifest"]
)
def test_every_command_refuses_it_with_exit_code_3(judged, cli, command, name):
    cli(command[0], judged["paths"][name], *command[1:]).refused(3, HOSTILE[name][1])


@pytest.mark.parametrize("name", ["a pipe as manifest", "a link as manifest"])
def test_a_build_does_not_wait_for_what_lies_where_it_writes(judged, tiny, cli, copy_of, name):
    """Opening a pipe waits for whoever writes to it."""
    place = judged["paths"][name]
    cli("build", tiny.source, "-o", place, *tiny.arguments).refused(2, str(place))


REFUSE = """
import json, sys
from lrq_export.cli import main
for words in json.load(sys.stdin):
    sys.argv = ["lrq-export", *words]
    try:
        main()
    except SystemExit as stopped:
        print(json.dumps({"code": stopped.code, "torch": "torch" in sys.modules}))
"""


def test_commands_refuse_before_they_import_torch(judged):
    path = str(judged["paths"]["a shape that overflows"])
    asked = json.dumps([[name, path, *rest] for name, *rest in COMMANDS])
    done = subprocess.run([sys.executable, "-c", REFUSE], input=asked, cwd=ROOT, capture_output=True, text=True)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said == [{"code": 3, "torch": False}] * len(COMMANDS)
    assert len(done.stderr.splitlines()) == len(COMMANDS)


def test_random_flips_of_every_file_are_refused(package, copy_of):
    folder, dice = copy_of(package), random.Random(5)
    for name in packages.list_files(folder):
        content = (folder / name).read_bytes()
        for _ in range(6):
            edited = bytearray(content)
            edited[dice.randrange(len(edited))] ^= 1 << dice.randrange(8)
            (folder / name).write_bytes(edited)
            with pytest.raises(InputError) as caught:
                admit(folder)
            assert Path(name).name in str(caught.value)
        (folder / name).write_bytes(content)
    admit(folder)


@pytest.mark.parametrize("name", [MODEL, ENGINE, "graphs/0-trace.onnx", QUANTIZED, "engine/onnxruntime/session.json"])
def test_random_damage_behind_right_hashes_ends_in_one_line_or_in_a_working_session(package, copy_of, name):
    folder, dice, files = copy_of(package), random.Random(6), packages.load_manifest(package)["files"]
    beside = {each: files[each] for each in files if Path(each).parent == Path(name).parent}
    content = (folder / name).read_bytes()
    refused = []
    for _ in range(25):
        edited = bytearray(content)
        for _ in range(dice.choice((1, 1, 4))):  # the structure lies at both ends of a model, weights between
            edited[dice.randrange(dice.choice((len(edited), min(2000, len(edited)))))] ^= dice.randrange(1, 256)
        (folder / name).write_bytes(edited)
        try:
            _check_files(folder, beside)
            if name.startswith("engine"):
                open_session(folder / "engine/onnxruntime")
        except InputError as error:
            refused.append(str(error))
    assert refused
    assert all(line.isprintable() for line in refused)


def test_a_package_is_hashed_again_only_when_a_file_changed(package, copy_of, monkeypatch):
    folder, hashed, digest = copy_of(package), [], packages.sha256_file
    monkeypatch.setattr(packages, "sha256_file", lambda path: hashed.append(path) or digest(path))
    admit(folder)
    once = len(hashed)
    admit(folder)
    assert once == len(hashed) > 10
    facts = (folder / MODEL).stat()
    (folder / MODEL).write_bytes(flip((folder / MODEL).read_bytes()))
    os.utime(folder / MODEL, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # the time of its change cannot be set back
    with pytest.raises(InputError, match=r"model\.onnx: was edited"):
        admit(folder)


def test_a_build_leaves_nothing_that_everyone_may_write(package, tmp_path):
    mask = os.umask(0)
    try:
        (tmp_path / "out").mkdir()
        put("engine/x/file", b"x")(tmp_path / "out")
        packages.write_manifest(tmp_path / "out", {})
    finally:
        os.umask(mask)
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(paths) == 5
    assert not [path for path in paths if path.stat().st_mode & 0o002]
    packages.verify_hashes(tmp_path / "out")


def test_the_header_of_a_sound_file_is_what_safetensors_reads(package):
    from safetensors import safe_open

    metadata, entries = read_header(package / QUANTIZED)
    with safe_open(package / QUANTIZED, framework="np") as file:
        assert set(file.keys()) == entries.keys()
        assert file.metadata() == metadata
        assert all(tuple(file.get_slice(name).get_shape()) == entry.shape for name, entry in entries.items())


ENTRIES = {
    "load": "import lrq_export; lrq_export.load(sys.argv[1])",
    "doctor": "from lrq_export.cli import main; sys.argv[:] = ['lrq-export', 'doctor', sys.argv[1]]; main()",
    "verify": "from lrq_export.cli import main; sys.argv[:] = ['lrq-export', 'verify', sys.argv[1]]; main()",
    "serve": "from lrq_export.cli import main; sys.argv[:] = ['lrq-export', 'serve', sys.argv[1]]; main()",
    "build": "from lrq_export.cli import main; sys.argv[:] = "
    "['lrq-export', 'build', sys.argv[1], '--target', 'tensorrt-rtx']; main()",
}
WHOLE_PROGRAM = """
import json, sys, time
from lrq_export.errors import LrqError
code = 0
try:
    {entry}
except LrqError as error:
    code = error.exit_code
except SystemExit as stopped:
    code = stopped.code
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({{"code": code, "peak": peak, "seconds": time.process_time(), "torch": "torch" in sys.modules}}))
"""


def program(entry, package):
    """What a whole program made of a package: exit code, bytes at most, processor seconds, whether torch was there."""
    command = [sys.executable, "-c", WHOLE_PROGRAM.format(entry=ENTRIES.get(entry, entry)), str(package)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_whole_program_refuses_within_the_bounds(judged, entry):
    """The dearest of them to refuse, by memory, and a byte that flipped: imports are counted, too."""
    dearest = max(HOSTILE, key=lambda name: judged["verdicts"][name]["peak"])  # the first after which it is no more
    for name in dict.fromkeys((dearest, "as many values as are read", "a flipped byte")):
        found = program(entry, judged["paths"][name])
        assert found["code"] == 3, name
        assert found["peak"] < MOST_BYTES, name
        assert found["seconds"] < MOST_SECONDS, name
        assert not found["torch"], name


NAMED = {
    "load": "import lrq_export; lrq_export.load(sys.argv[1], target='tensorrt-rtx')",
    "serve": "from lrq_export.cli import main; sys.argv[:] = "
    "['lrq-export', 'serve', sys.argv[1], '--target', 'tensorrt-rtx']; main()",
    "verify": "from lrq_export.cli import main; sys.argv[:] = "
    "['lrq-export', 'verify', sys.argv[1], '--against', 'tensorrt-rtx']; main()",
}
OTHER_VERSION = """from lrq_export.engine import run_obstacle
    run_obstacle.installed_tensorrt = lambda *_: "{here}"
    {entry}"""


@pytest.mark.parametrize("entry", NAMED.values(), ids=NAMED)
def test_a_plan_from_another_version_is_refused_within_the_bounds(package, copy_of, reseal, plan_of, entry):
    """As its build.json tells; without a GPU one of the same version is exit code 4, which torch is asked for."""
    folder = copy_of(package)
    put("engine/tensorrt-rtx/model.plan", plan_of("tensorrt-rtx", "1.6.0.5"))(folder)
    facts = {"target": "tensorrt-rtx", "version": "1.6.0.5", "plugins": False}
    put("engine/tensorrt-rtx/build.json", json.dumps(facts).encode())(folder)
    reseal(folder)
    found = program(OTHER_VERSION.format(here="1.7.1.116", entry=entry), folder)
    assert found["code"] == 3
    assert found["peak"] < MOST_BYTES
    assert found["seconds"] < MOST_SECONDS
    assert not found["torch"]
    same = program(OTHER_VERSION.format(here="1.6.0.5", entry=entry), folder)
    assert (same["code"], same["torch"]) == (4, True)


def test_a_program_that_loads_torch_would_be_seen(judged):
    """The twin: doctor of a sound package asks torch for its version."""
    assert program("doctor", judged["paths"]["sound"])["torch"]
