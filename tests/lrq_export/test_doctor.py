"""`lrq-export doctor`: every wrong finding, on machines that a test makes up, and this one as it is."""

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lrq_export.doctor import cpu, gpu
from lrq_export.doctor.elf import read_library
from lrq_export.doctor.finding import Status
from lrq_export.doctor.run import diagnose, exit_code
from lrq_export.doctor.system import Driver, System, version_of
from lrq_export.engine.run_obstacle import run_obstacle
from lrq_export.errors import InputError, MissingError

GOOD_DRIVER = Driver((13, 0), (("H100", (9, 0)),))
FIT = {"versions": {"tensorrt": "10.16.1"}, "driver": GOOD_DRIVER}  # a machine that runs engines of that version
HEADERS = "#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 16\n"


class Machine(System):
    """One on which all is well, but for what a test says: attributes and answers by the method's name."""

    environment, python, kind = {}, (3, 12, 1), "Linux x86_64"

    def __init__(self, **answers):
        self.answers = {
            "versions": {"torch": "2.13.0+cpu", "onnx": "1.23.2", "onnxruntime": "1.31.1", "numpy": "2.4"},
            "requirements": {"torch": "2.13", "onnx": "1.21", "onnxruntime": "1.31", "numpy": "2.0"},
            "providers": ["CPUExecutionProvider"], "driver": None, "free_disk": 50 << 30,
            "memory": (64 << 30, 32 << 30),
            "programs": {"c++": "12.2.0", "cmake": "", "nvcc": "Cuda compilation tools, release 13.0, V13.0.88"},
            "folders": {}, "broken": {}, "system_library": None, "plugin_library": None, "header_folders": [],
        }  # fmt: skip
        for name, value in answers.items():
            if isinstance(value, dict) and isinstance(self.answers.get(name), dict):
                self.answers[name] = self.answers[name] | value
            elif name in self.answers:
                self.answers[name] = value
            else:
                setattr(self, name, value)

    def version(self, distribution):
        return self.answers["versions"].get(distribution)

    def requirements(self):
        return self.answers["requirements"]

    def import_error(self, module):
        return self.answers["broken"].get(module)

    def folders(self, module):
        return self.answers["folders"].get(module, [])

    def providers(self):
        return self.answers["providers"]

    def which(self, program):
        return program if self.answers["programs"].get(program) is not None else None

    def output(self, *command):
        return self.answers["programs"].get(command[0])

    def system_library(self, name):
        return self.answers["system_library"]

    def driver(self):
        return self.answers["driver"]

    def gpu(self):
        driver = self.answers["driver"]
        return driver.gpus[0][0] if isinstance(driver, Driver) and driver.gpus else None

    def plugin_library(self):
        if isinstance(self.answers["plugin_library"], Exception):
            raise self.answers["plugin_library"]
        return self.answers["plugin_library"]

    def header_folders(self):
        return self.answers["header_folders"]

    def free_disk(self, path):
        return self.answers["free_disk"]

    def memory(self):
        return self.answers["memory"]


# (check, what is wrong with the machine, what the line says, how to fix it)
REQUIRED = [
    (cpu.python, {"python": (3, 10, 4)}, "got 3.10.4, needed 3.11", "newer Python"),
    (cpu.python, {"kind": "Windows AMD64"}, "got Windows AMD64, needed Linux", "WSL"),
    (cpu.torch, {"versions": {"torch": None}}, "is not installed", "pip install 'torch>=2.13'"),
    (cpu.torch, {"versions": {"torch": "2.9.1"}}, "got 2.9.1, needed 2.13", "pip install 'torch>=2.13'"),
    (cpu.torch, {"broken": {"torch": "OSError: libc10.so"}}, "cannot be imported: OSError: libc10.so", "reinstall"),
    (cpu.onnx, {"versions": {"onnx": "1.20.0"}}, "got 1.20.0, needed 1.21", "pip install 'onnx>=1.21'"),
    (cpu.onnxruntime, {"versions": {"onnxruntime": None}}, "is not installed", "onnxruntime>=1.31"),
    (cpu.onnxruntime, {"versions": {"onnxruntime-gpu": "1.31.1"}}, "both installed", "pip uninstall"),
    (cpu.onnxruntime, {"versions": {"onnxruntime": "1.24.0"}}, "got 1.24.0, needed 1.31", "onnxruntime>=1.31"),
    (cpu.onnxruntime, {"providers": ["AzureExecutionProvider"]}, "no CPU provider", "install it again"),
    (cpu.other_libraries, {"versions": {"numpy": "1.26"}}, "numpy: got 1.26, needed 2.0", "pip install 'numpy>=2.0'"),
    (cpu.other_libraries, {"versions": {"numpy": None}}, "numpy: got none, needed 2.0", "pip install 'numpy>=2.0'"),
    (cpu.disk, {"free_disk": 1 << 20}, "got 0.0 GiB free here, needed 1", "free some"),
    (cpu.memory, {"memory": (8 << 30, 1 << 30)}, "1.0 of 8.0 GiB available, needed 2", "add memory"),
]  # fmt: skip
OPTIONAL = [
    (gpu.driver, {"driver": "cuInit returns 804"}, "does not work: cuInit returns 804", "driver that fits"),
    (gpu.driver, {"driver": Driver((13, 0), ())}, "sees no GPU", "CUDA_VISIBLE_DEVICES"),
    (gpu.driver, {"driver": Driver((11, 8), GOOD_DRIVER.gpus)}, "CUDA up to 11.8, needed 12.0", "newer driver"),
    (gpu.driver, {"driver": Driver((13, 0), (("V100", (7, 0)),))}, "V100 has a compute capability below", "Turing"),
    (
        gpu.driver, {"driver": Driver((12, 8), GOOD_DRIVER.gpus), "versions": {"onnxruntime-gpu": "1.31.1"}},
        "onnxruntime-gpu 1.31.1 needs 13.0", "newer driver",
    ),
    (gpu.tensorrt, {"system_library": "libnvinfer.so.10"}, "its Python package is not", "pip install tensorrt-cu13"),
    (gpu.tensorrt, {"versions": {"tensorrt": "10.3.0"}}, "got 10.3.0, needed 10.7", "-U tensorrt-cu13"),
    (gpu.tensorrt, {"versions": {"tensorrt-cu13": "11.4.0"}}, "11.4.0 has no libnvinfer", "force-reinstall"),
    (
        gpu.tensorrt, {"versions": {"tensorrt": "11.4.0"}, "system_library": "libnvinfer.so.10"},
        "the Python package is 11.4.0, the library libnvinfer.so.10", "in one version",
    ),
    (gpu.tensorrt_rtx, {"versions": {"tensorrt-rtx": "1.7.1"}}, "has no libtensorrt_rtx.so", "force-reinstall"),
    (gpu.compiler, {"environment": {"CXX": "icpx"}}, "CXX names icpx, which is not here", "unset it"),
    (gpu.compiler, {"programs": {"c++": "what?"}}, "does not say its version", "g++ 9"),
    (gpu.compiler, {"programs": {"c++": "7.5.0"}}, "got 7.5.0, needed 9", "newer one"),
    (gpu.compiler, {"programs": {"cmake": None}}, "cmake is not", "pip install cmake"),
    (gpu.nvcc, {"programs": {"nvcc": "release 11.8, V11"}}, "got 11.8, needed 12.8", "newer CUDA toolkit"),
    (gpu.nvcc, {"programs": {"nvcc": ""}}, "got no version", "newer CUDA toolkit"),
    (gpu.cutlass, {"environment": {"CUTLASS_ROOT": "/nowhere"}}, "holds no cutlass/cutlass.h", "unset it"),
    (gpu.headers, {"environment": {"TENSORRT_ROOT": "/nowhere"}}, "has no include/NvInfer.h", "unset it"),
    (
        gpu.plugins, {"plugin_library": MissingError("LRQ_PLUGINS: /x is not there", hint="unset it")},
        "LRQ_PLUGINS: /x is not there", "unset it",
    ),
    (gpu.plugins, {"plugin_library": Path(__file__)}, "is no 64-bit shared library", "plugins build"),
    (gpu.plugins, {"plugin_library": Path("/nowhere.so")}, "cannot be read", "plugins build"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "faults", "text", "fix", "required"),
    [(*row, True) for row in REQUIRED] + [(*row, False) for row in OPTIONAL],
)
def test_a_fault_is_found_and_how_to_mend_it(check, faults, text, fix, required):
    found = check(Machine(**faults))
    assert found.status is Status.WRONG, found
    assert text in found.text
    assert fix in found.fix
    assert found.required == required
    assert "\n" not in found.line()
    assert check(Machine()).status is not Status.WRONG  # the fault is what made it wrong
    assert exit_code([check(Machine()), found]) == (4 if required else 0)


def test_a_machine_without_any_gpu_is_sound():
    findings = list(diagnose(system=Machine()))
    assert {found.status for found in findings} == {Status.OK, Status.ABSENT}
    assert exit_code(findings) == 0
    optional = {found.name for found in findings if found.status is Status.ABSENT}
    assert {"CUDA driver", "TensorRT", "TensorRT provider", "TensorRT-RTX", "CUTLASS", "plugins"} <= optional
    assert all("absent: needed for " in found.line() for found in findings if found.status is Status.ABSENT)


def test_a_machine_with_everything_is_sound(tmp_path, compiled):
    put(tmp_path / "include/NvInfer.h")
    put(tmp_path / "include/NvInferVersion.h", HEADERS)
    put(tmp_path / "cutlass/cutlass.h")
    put(tmp_path / "trt/libnvinfer.so.10")
    put(tmp_path / "rtx/libtensorrt_rtx.so.1")
    put(tmp_path / "rtx/libtensorrt_rtx.so")
    provider = tmp_path / "ort/capi/libonnxruntime_providers_tensorrt.so"
    provider.parent.mkdir(parents=True)
    provider.write_bytes(compiled(needs="libnvinfer.so.10").read_bytes())
    machine = Machine(
        driver=GOOD_DRIVER, environment={"TENSORRT_ROOT": str(tmp_path), "CUTLASS_ROOT": str(tmp_path)},
        folders={"tensorrt_libs": [tmp_path / "trt"], "tensorrt_rtx_libs": [tmp_path / "rtx"],
                 "onnxruntime": [tmp_path / "ort"]},
        versions={"tensorrt-cu13": "10.16.1", "tensorrt-rtx": "1.7.1", "onnxruntime": None,
                  "onnxruntime-gpu": "1.31.1"},
        plugin_library=compiled("getCreators", "setLoggerFinder"),
    )  # fmt: skip
    findings = {found.name: found for found in diagnose(system=machine)}
    assert [found.line() for found in findings.values() if found.status is not Status.OK] == []
    assert "compute capability 9.0" in findings["CUDA driver"].text
    assert findings["TensorRT headers"].text == "10.16"
    assert "crash" not in findings["TensorRT-RTX"].text


def put(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def compiled(tmp_path):
    """A shared library that exports functions and needs another one; both made by the C compiler."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (install gcc)")

    def build(*functions, needs=None):
        folder = tmp_path / f"compiled-{'-'.join(functions)}-{needs}"
        folder.mkdir()
        source, library = folder / "source.c", folder / "library.so"
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in functions) or "int one = 1;\n")
        command = ["cc", "-shared", "-fPIC", "-o", library, source]
        if needs is not None:
            put(folder / "empty.c", "int two = 2;\n")
            subprocess.run(
                ["cc", "-shared", f"-Wl,-soname,{needs}", "-o", folder / needs, folder / "empty.c"], check=True
            )
            command += ["-Wl,--no-as-needed", folder / needs]
        subprocess.run(command, check=True)
        return library

    return build


def test_a_library_is_read_as_the_linker_reads_it(compiled):
    library = read_library(compiled("getCreators", needs="libnvinfer.so.10"))
    assert "getCreators" in library.exported
    assert "setLoggerFinder" not in library.exported
    assert "libnvinfer.so.10" in library.needed
    assert "libc.so.6" in library.needed


@pytest.mark.parametrize(
    ("functions", "needs", "text"),
    [
        (("getCreators",), None, "does not export setLoggerFinder"),
        (("setLoggerFinder",), None, "does not export getCreators"),
        (("getCreators", "setLoggerFinder"), "libnvinfer.so.10", "is linked to libnvinfer.so.10"),
    ],
)
def test_plugins_of_another_interface_are_found(compiled, functions, needs, text):
    found = gpu.plugins(Machine(plugin_library=compiled(*functions, needs=needs)))
    assert found.status is Status.WRONG
    assert text in found.text


def test_a_damaged_library_is_a_value_error(compiled, tmp_path):
    content = compiled("getCreators").read_bytes()
    for size in (0, 10, 64, 1000, len(content) // 2):
        (tmp_path / "cut.so").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"shared library|damaged"):
            read_library(tmp_path / "cut.so")


@pytest.mark.parametrize(
    ("here", "text"),
    [("libnvinfer.so.11", "whose engines it cannot load"), (None, "none is here")],
)
def test_a_provider_of_another_tensorrt_is_found(compiled, tmp_path, here, text):
    provider = tmp_path / "capi/libonnxruntime_providers_tensorrt.so"
    provider.parent.mkdir()
    provider.write_bytes(compiled(needs="libnvinfer.so.10").read_bytes())
    versions = {"tensorrt": "11.4.0"} if here else {}
    found = gpu.pairing(Machine(folders={"onnxruntime": [tmp_path]}, system_library=here, versions=versions))
    assert found.status is Status.WRONG
    assert text in found.text
    assert "tensorrt-cu13>=10,<11" in found.fix


def test_the_missing_link_of_tensorrt_rtx_is_said(tmp_path):
    put(tmp_path / "libtensorrt_rtx.so.1")
    found = gpu.tensorrt_rtx(Machine(versions={"tensorrt-rtx": "1.7.1"}, folders={"tensorrt_rtx_libs": [tmp_path]}))
    assert found.status is Status.OK  # lrq-export makes a link of its own
    assert f"ln -s libtensorrt_rtx.so.1 {tmp_path}/libtensorrt_rtx.so" in found.text


@pytest.mark.parametrize("text", ["#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 3\n", "nothing"])
def test_headers_of_an_old_tensorrt_are_found(tmp_path, text):
    put(tmp_path / "NvInfer.h")
    put(tmp_path / "NvInferVersion.h", text)
    found = gpu.headers(Machine(header_folders=[tmp_path]))
    assert found.status is Status.WRONG
    assert "needed 10.7" in found.text


def test_headers_that_spell_their_version_through_a_macro_are_read(tmp_path):
    put(tmp_path / "NvInfer.h")
    put(tmp_path / "NvInferVersion.h", "#define TRT_MAJOR 11\n#define NV_TENSORRT_MAJOR TRT_MAJOR //!< x\n"
        "#define NV_TENSORRT_MINOR 1 //!< y\n")  # fmt: skip
    assert gpu.headers(Machine(header_folders=[tmp_path])).text == "11.1"


def test_a_check_that_fails_itself_is_a_finding():
    findings = list(diagnose(system=Machine(memory=())))
    (failed,) = [found for found in findings if "could not be checked" in found.text]
    assert failed.required
    assert exit_code(findings) == 4


def test_a_driver_that_is_not_there_is_no_crash(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert System().driver() is None


def test_versions_are_compared_as_numbers():
    assert version_of("v10.16.1rc2") == (10, 16, 1)
    assert version_of("10.7") < version_of("10.16")
    assert version_of("none") == ()


# --- packages


def engine(folder, target, version, **facts):
    start = b"ftrt" if target == "tensorrt" else b"vtrt"
    (folder / "engine" / target).mkdir()
    numbers = bytes(map(int, version.split(".")))
    (folder / "engine" / target / "model.plan").write_bytes(start + bytes(20) + numbers + bytes(100))
    told = {"target": target, "version": version, "plugins": False}
    put(folder / "engine" / target / "build.json", json.dumps(told | facts))


def about(package, machine):
    return {found.name: found for found in diagnose(package, machine)}


def test_a_package_is_checked_too(package):
    found = about(package, Machine())
    assert found["package"].status is found["engine onnxruntime"].status is Status.OK
    assert found["engine tensorrt"].status is Status.ABSENT
    assert f"lrq-export build {package} --target tensorrt-rtx" in found["engine tensorrt-rtx"].fix


def test_an_edited_package_is_a_bad_input(package, copy_of):
    edited = copy_of(package)
    (edited / "report.json").write_text("{}")
    findings = list(diagnose(edited, Machine()))
    assert "report.json: was edited" in findings[-1].text
    assert exit_code(findings) == 3


@pytest.mark.parametrize("file", ["model.onnx", "session.json"])
def test_a_package_without_an_engine_is_incomplete(package, copy_of, reseal, file):
    bare = copy_of(package)
    (bare / "engine/onnxruntime" / file).unlink()
    reseal(bare)
    findings = list(diagnose(bare, Machine()))
    assert exit_code(findings) == 4


@pytest.mark.parametrize(
    ("target", "answers", "facts", "text"),
    [
        ("tensorrt", {}, {}, "the Python package tensorrt is not installed"),
        (
            "tensorrt",
            FIT | {"versions": {"tensorrt": "11.4.0"}},
            {},
            "is of tensorrt 10.16.1, the library here is 11.4.0",
        ),
        ("tensorrt", {"versions": {"tensorrt": "10.16.1"}}, {}, "no CUDA GPU that torch sees"),
        ("tensorrt", FIT, {"plugins": True}, "not compiled"),
        ("tensorrt", FIT, {"options": {"strip": True}}, "has no weights (engine.strip)"),
        ("tensorrt", FIT | {"plugin_library": MissingError("LRQ_PLUGINS: x")}, {"plugins": True}, "LRQ_PLUGINS: x"),
        (
            "tensorrt-rtx",
            {"versions": {"tensorrt-rtx": "1.6.0"}, "driver": GOOD_DRIVER},
            {},
            "the library here is 1.6.0",
        ),
    ],
)
def test_an_engine_that_cannot_run_here_says_why(package, copy_of, reseal, target, answers, facts, text):
    folder = copy_of(package)
    engine(folder, target, "10.16.1", **facts)
    reseal(folder)
    found = about(folder, Machine(**answers))[f"engine {target}"]
    assert found.status is Status.WRONG
    assert text in found.text
    lack = run_obstacle(folder, target, Machine(**answers))  # what `load` says
    assert (found.text, found.fix) == (lack.message, lack.hint)


def test_an_engine_of_another_version_is_a_bad_file_with_a_gpu_or_without(package, copy_of, reseal):
    folder = copy_of(package)
    engine(folder, "tensorrt-rtx", "10.16.1")
    reseal(folder)
    lack = run_obstacle(folder, "tensorrt-rtx", Machine(versions={"tensorrt-rtx": "1.6.0"}))
    assert isinstance(lack, InputError)
    assert "the library here is 1.6.0" in lack.message


def test_an_engine_of_another_library_is_built_again_with_nothing_removed(package, copy_of, reseal):
    """A package that lacks a file is refused."""
    folder = copy_of(package)
    engine(folder, "tensorrt", "10.16.1")
    reseal(folder)
    found = about(folder, Machine(versions={"tensorrt": "11.4.0"}, driver=GOOD_DRIVER))["engine tensorrt"]
    assert found.fix == f"run lrq-export build {folder} --target tensorrt"


def test_an_engine_of_this_library_can_run_where_a_gpu_is(package, copy_of, reseal):
    folder = copy_of(package)
    engine(folder, "tensorrt", "10.16.1")
    reseal(folder)
    found = about(folder, Machine(versions={"tensorrt": "10.16.1"}, driver=GOOD_DRIVER))["engine tensorrt"]
    assert found.status is Status.OK


# --- this machine, through the command line


def test_this_machine_can_run_the_cpu_path(cli, package):
    outcome = cli("doctor", package)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[0].startswith("package")  # before anything that could be attacked is imported
    assert lines[1].startswith("Python")
    assert any(line.startswith("ONNX Runtime") and "CPU" in line for line in lines)
    assert all(": " in line for line in lines)


def test_json_lines_hold_the_same(cli):
    outcome = cli("doctor", "--json")
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert {row["event"] for row in rows} == {"finding"}
    assert {"name", "status", "text", "fix", "required"} <= rows[0].keys()
    assert len(rows) == len(cpu.CHECKS) + len(gpu.CHECKS)


def test_no_package_is_exit_code_3(cli, tmp_path):
    outcome = cli("doctor", tmp_path)
    assert outcome.code == 3
    assert "not an lrq-export package" in outcome.out.splitlines()[-1]
