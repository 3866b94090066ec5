"""The script for a borrowed GPU, with stand-ins for what it calls: what it runs, in what order, and what it says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/gpu_day"
CMAKE = """echo "cmake $*" >> calls
case "$1" in
    --build) cd build/kernels/lib; for name in $MADE; do echo new > "$name"; done; exit $BUILD ;;
esac"""
PYTHON = """case "$*" in *"import torch"*) exit $TORCH ;; *"import tensorrt"*) exit 1 ;; esac
echo "$* kernels=$(cat "$LRQ_KERNELS") plugins=${LRQ_PLUGINS:+yes}" >> calls"""
STAND_INS = {
    "nvidia-smi": 'case "$*" in *compute_cap*) echo 9.0 ;; *) echo name ;; esac', "cmake": CMAKE,
    "compute-sanitizer": 'echo "compute-sanitizer $* uncached=$PYTORCH_NO_CUDA_MEMORY_CACHING" >> calls',
    "timeout": 'shift; "$@"', "nproc": "echo 2",
}  # fmt: skip
BOTH = "liblrq_kernels.so liblrq_plugins.so"


@pytest.fixture
def gpu_day(tmp_path):
    """Run the script in a folder of its own; returns its exit code, its summary and what it called."""

    def run(made=BOTH, build=0, torch=0, without=()):
        for folder in ("tools", "bin", "venv", "build/kernels/lib"):
            (tmp_path / folder).mkdir(parents=True)
        shutil.copy(SCRIPT, tmp_path / "tools")
        (tmp_path / "build/kernels/lib/liblrq_kernels.so").write_text("old")
        commands = {f"bin/{name}": text for name, text in STAND_INS.items() if name not in without}
        for name, text in (commands | {"venv/python": PYTHON}).items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LRQ_PYTHON": "venv/python", "MADE": made, "BUILD": str(build),
            "TORCH": str(torch),
        }  # fmt: skip
        done = subprocess.run(["bash", "tools/gpu_day"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        calls = tmp_path / "calls"
        summary = (tmp_path / "out/gpu-day/summary.txt").read_text()
        return done.returncode, summary, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_everything_runs_and_the_measurements_before_what_takes_long(gpu_day, tmp_path):
    code, summary, calls = gpu_day()
    assert code == 0
    assert "FAILED" not in summary
    order = (
        "cmake -S",
        "cmake --build",
        "kernel_report",
        "test_kernels_gpu.py -v",
        "bench_kernels",
        "--ignore",
        "memcheck",
    )
    at = [next(place for place, call in enumerate(calls) if what in call) for what in order]
    assert at == sorted(at)
    assert f"-DPython3_EXECUTABLE={tmp_path}/venv/python" in calls[0], "CMake takes no relative path"
    assert "-DLRQ_CUDA_ARCHITECTURES=90a" in calls[0]
    ours = [call for call in calls if " kernels=" in call]
    assert all(call.endswith("kernels=new plugins=yes") for call in ours)
    assert all("uncached=1" in call for call in calls if call.startswith("compute-sanitizer"))


def test_a_library_of_an_earlier_build_is_not_measured(gpu_day):
    code, summary, calls = gpu_day(made="", build=2)
    assert code == 1
    assert "build: FAILED" in summary
    assert "tests and measurements: not run" in summary
    assert len(calls) == 2


def test_without_the_headers_the_kernels_are_measured_and_the_plugins_named(gpu_day):
    code, summary, calls = gpu_day(made="liblrq_kernels.so")
    assert code == 0
    assert "plugins on the GPU: not run" in summary
    assert any("bench_kernels" in call for call in calls)


def test_a_torch_that_sees_no_gpu_does_not_pass(gpu_day):
    """Its tests would all be skipped."""
    code, summary, calls = gpu_day(torch=1)
    assert (code, calls) == (4, [])
    assert "no torch that sees the GPU" in summary


def test_without_a_gpu_nothing_is_run(gpu_day):
    code, summary, calls = gpu_day(without=["nvidia-smi"])
    assert (code, calls) == (4, [])
    assert "no GPU" in summary
