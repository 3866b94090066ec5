"""Every plugin, walked through its life as TensorRT would, without TensorRT: `host/` says what is asked of it.

Where there is no GPU the kernels are reference loops on the CPU; the plugins are the same.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import golden
import kernel_machine
import numpy as np
import pytest
import trt_build

from graphs.ops import OPS
from graphs.ops.spec import Example

MUTANTS = re.findall(r'\{Kind::k\w+, "(\w+)"\}', (trt_build.HOST / "mutants.h").read_text())


@pytest.fixture(scope="module")
def headers():
    trt_build.skip_if_missing()
    return trt_build.all_headers()


@pytest.fixture(scope="module")
def library(headers, tmp_path_factory):
    """Compiled against the oldest headers there are."""
    return trt_build.build_library(tmp_path_factory.mktemp("library"), headers[0])


@pytest.fixture(scope="module")
def host(headers, tmp_path_factory):
    """Compiled against the newest ones: the library is one binary for all of them."""
    return trt_build.build_host(tmp_path_factory.mktemp("host"), headers[-1])


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "cases"
    golden.write_cases(path, golden.all_cases())
    return path


def run(host, *arguments):
    return subprocess.run([host, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def small_cases():
    """One of every op and layout: the emulator runs a GPU's threads one by one."""
    chosen = {}
    for case in golden.all_cases():
        if max(array.size for array in case.example.inputs) <= 1500:
            chosen.setdefault((case.spec.name, case.example.attributes.get("layout")), case)
    return list(chosen.values())


def test_the_plugins_conform_over_the_cuda_kernels_as_emulated(host, headers, shared_folder, tmp_path):
    """The kernels' own checks and launches, compiled for the CPU as tests/plugins/kernels does it."""
    kernels = kernel_machine.build_emulated(shared_folder / "emulated-kernels")
    library = trt_build.build_library(tmp_path, headers[-1], kernels)
    cases = small_cases()
    assert {case.spec.name for case in cases} == set(OPS)
    golden.write_cases(tmp_path / "cases", cases)
    found = run(host, library, tmp_path / "cases")
    assert found.returncode == 0, found.stdout


def test_every_op_has_cases_in_every_type():
    labels = {tuple(case.label.split(".")[::2]) for case in golden.all_cases()}
    for name, spec in OPS.items():
        kinds = ("float", "float16", "bfloat16") if "T" in spec.type_vars else ("float",)
        assert {(name, kind) for kind in kinds} <= labels


def test_every_plugin_conforms(library, host, cases):
    found = run(host, library, cases)
    assert (found.returncode, found.stdout) == (0, f"{len(golden.all_cases())} cases, 0 failed\n"), found.stderr


@pytest.fixture(scope="module")
def caught(library, host, cases):
    """Each wrong version of a plugin, and the check that caught it."""
    found = run(host, library, cases, "--mutants")
    return dict(re.findall(r"^caught (\w+): (.+)$", found.stdout, re.MULTILINE))


def test_the_wrapper_of_wrong_plugins_alone_is_right(caught):
    assert "right" in MUTANTS
    assert "right" not in caught


@pytest.mark.parametrize("mutant", [each for each in MUTANTS if each != "right"])
def test_a_wrong_plugin_is_caught(caught, mutant):
    assert mutant in caught


def test_there_are_wrong_plugins():
    assert len(MUTANTS) > 20


@pytest.mark.parametrize("label", ["TwinLogLinear.0.float", "GegluRotate.2.float16", "Int8Dequant.0.float"])
def test_one_perturbed_number_is_seen(library, host, tmp_path, label):
    """The reference computes with one other input; the plugin with the right one."""
    (case,) = [case for case in golden.all_cases() if case.label == label]

    def perturbed(*inputs, **attributes):
        first = inputs[0].copy()
        first.flat[-1] += np.asarray(8, first.dtype)
        return case.spec.reference(first, *inputs[1:], **attributes)

    golden.write_cases(tmp_path / "cases", [replace(case, spec=replace(case.spec, reference=perturbed))])
    found = run(host, library, tmp_path / "cases")
    assert found.returncode == 1
    assert re.search(rf"^FAILED {label}: computes something else", found.stdout, re.MULTILINE)


def test_the_messages_reach_a_program_of_tensorrt_10(library, headers, tmp_path):
    """Its logger lies otherwise in memory than that of the newest version, which the other tests have."""
    tens = [each for each in headers if each.version[0] == 10]
    if not tens:
        pytest.skip("needs the headers of TensorRT 10")
    cases = [case for case in golden.all_cases() if case.label.endswith(".0.float")]
    golden.write_cases(tmp_path / "cases", cases)
    found = run(trt_build.build_host(tmp_path, tens[-1]), library, tmp_path / "cases")
    assert (found.returncode, found.stderr) == (0, ""), found.stdout


@pytest.mark.parametrize("name", ["LayerNormRotate", "TwinLogLinearResidual"])
def test_what_broadcasts_over_axes_apart_is_refused(library, host, tmp_path, name):
    """Over the first and the last axis of tokens, but not the one between: there is no stride for that."""
    (case,) = [each for each in golden.all_cases() if each.label.startswith(name) and each.label.endswith(".float")
               and each.example.inputs[0].ndim == 4]  # fmt: skip
    at = [tensor.name for tensor in case.spec.inputs].index("gate" if name.endswith("Residual") else "shift")
    inputs = list(case.example.inputs)
    inputs[at] = np.ones((2, 1, 3, inputs[at].shape[-1]), np.float32)
    golden.write_cases(tmp_path / "cases", [replace(case, example=Example(tuple(inputs), case.example.attributes))])
    said = run(host, library, tmp_path / "cases").stdout
    assert "refuses its own shapes" in said, "when shapes are set, not first when it is run"
    assert "in a way that the kernels do not read" in said


def test_an_op_without_a_plugin_is_seen(library, host, tmp_path):
    case = golden.all_cases()[0]
    golden.write_cases(tmp_path / "cases", [replace(case, spec=replace(case.spec, name="Unknown"))])
    assert "has no creator" in run(host, library, tmp_path / "cases").stdout


def test_the_library_exports_two_functions_and_needs_no_tensorrt(library):
    listed = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    exported = re.findall(r"^\w+ T (\w+)$", listed, re.MULTILINE)
    assert sorted(exported) == ["getCreators", "setLoggerFinder"]
    undefined = re.findall(r"^ +U (\w+)", listed, re.MULTILINE)
    assert not [name for name in undefined if re.match(r"getPluginRegistry|.*nvinfer1|cuda", name)]
    assert "lrqLinear" in undefined


def test_the_plugins_compile_against_every_version(headers):
    """In full, what allocates on a GPU and the registering library included: with these headers' own functions."""
    for each in headers:
        trt_build.compile_together(sorted(trt_build.TRT.glob("*.cpp")), each, "-fsyntax-only")


# What we implement, and what we call but for the logger.
INTERFACES = (
    "IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One",
    "IExprBuilder", "IDimensionExpr", "VExprBuilder", "VDimensionExpr", "IPluginResourceContext",
)  # fmt: skip
STRUCTS = ("PluginField", "PluginFieldCollection", "PluginTensorDesc", "DynamicPluginTensorDesc", "Dims64", "DimsExprs")


def layouts(headers, folder):
    """Entries of each table of virtual functions and bytes of each class, by its name without namespaces of versions.

    A name that two versions of an interface share stands for the first.
    """
    dump = folder / headers.name
    trt_build.compile_together([Path("NvInferRuntime.h")], headers, "-fsyntax-only", f"-fdump-lang-class={dump}")
    found = {}
    for kind, pattern in (("virtual", r"^nvinfer1::([\w:]+)::_ZTV\w+: (\d+) entries$"),
                          ("bytes", r"^Class nvinfer1::([\w:]+)\n   size=(\d+)")):  # fmt: skip
        for name, count in re.findall(pattern, dump.read_text(), re.MULTILINE):
            found.setdefault((name.rpartition("::")[2], kind), int(count))
    return found


def test_one_binary_fits_every_version(headers, tmp_path):
    oldest, *newer = [layouts(each, tmp_path) for each in headers]
    used = [*((name, "virtual") for name in INTERFACES), *((name, "bytes") for name in STRUCTS)]
    assert all(each in oldest for each in used)
    for other in newer:
        assert {each: other[each] for each in used} == {each: oldest[each] for each in used}


def test_loggers_do_not_lie_alike(headers, tmp_path):
    """Why plugins/trt/log.cpp asks for the version; and that the test above would see such a change."""
    of_major = {each.version[0]: layouts(each, tmp_path) for each in headers}
    if not {10, 11} <= of_major.keys():
        pytest.skip("needs the headers of TensorRT 10 and 11")
    for name in ("ILogger", "ILoggerFinder"):
        assert of_major[11][name, "virtual"] == of_major[10][name, "virtual"] + 2


def test_the_host_for_a_gpu_compiles(headers, tmp_path):
    """With the captures that the one for the CPU leaves out; it runs where there is a GPU."""
    undefined = subprocess.run(
        ["nm", "-uC", trt_build.build_host(tmp_path, headers[-1], *trt_build.on_gpu())], capture_output=True, text=True
    ).stdout
    assert {"cudaStreamBeginCapture", "cudaGraphLaunch"} <= set(re.findall(r"cuda\w+", undefined))


@pytest.mark.gpu
def test_every_plugin_conforms_on_the_gpu(headers, cases, tmp_path):
    """The library that `lrq-export plugins build` made, on vectors in the GPU's memory: at once and in CUDA graphs."""
    from lrq_export.plugins import find_library

    library = find_library()
    if library is None:
        pytest.skip("needs the plugins: lrq-export plugins build")
    host = trt_build.build_host(tmp_path, headers[-1], *trt_build.on_gpu())
    found = run(host, library, cases)
    assert found.returncode == 0, found.stdout + found.stderr
