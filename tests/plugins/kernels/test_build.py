"""What the build of the kernels refuses, and what it says where it cannot compile them."""

import os
import shlex
import shutil
import subprocess

import pytest
from kernel_machine import KERNELS

REFUSE = KERNELS / "refuse_serialized_wgmma.sh"
REMARK = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."


def launched(script):
    return subprocess.run([str(REFUSE), "sh", "-c", script], capture_output=True, text=True)


def test_a_compiler_that_serialized_wgmma_has_failed():
    done = launched(f"echo '{REMARK}' >&2")
    assert done.returncode == 1
    assert REMARK in done.stderr
    assert "serialized, see above" in done.stderr


@pytest.mark.parametrize("status", [0, 1, 7])
def test_other_compilers_end_as_they_would(status):
    done = launched(f"echo 'ptxas info : Used 168 registers'; exit {status}")
    assert (done.returncode, done.stderr) == (status, "ptxas info : Used 168 registers\n")


@pytest.fixture
def configured(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("needs CMake: pip install cmake")

    def configure(*options):
        command = ["cmake", "-S", str(KERNELS.parent), "-B", str(tmp_path), *options]
        environment = {name: value for name, value in os.environ.items() if name != "CUTLASS_ROOT"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return configure


def test_without_cuda_the_core_is_built_alone(configured):
    assert "kernels: left out: no CUDA compiler" in configured("-DCMAKE_CUDA_COMPILER=")


def test_without_cutlass_the_core_is_built_alone(configured):
    said = configured("-DCMAKE_CUDA_COMPILER=nvcc", "-DPython3_EXECUTABLE=/bin/false")
    assert "kernels: left out: no CUTLASS" in said


NVCC = """#!/bin/sh
echo "$*" >> {log}
case "$*" in *wgmma.cu*) echo '{remark}' >&2; exit 0 ;; esac
exec {nvcc} "$@"
"""


def test_the_build_fails_where_wgmma_was_serialized_and_leaves_no_assert_to_it(configured, tmp_path):
    """By a stand-in for nvcc, in a build of a type that does not define NDEBUG by itself."""
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("needs nvcc on the path, which CMake asks what it can")
    stand_in, log, headers = (tmp_path / name for name in ("nvcc", "log", "headers/cutlass"))
    stand_in.write_text(NVCC.format(log=shlex.quote(str(log)), remark=REMARK, nvcc=os.path.realpath(nvcc)))
    stand_in.chmod(0o755)
    headers.mkdir(parents=True)
    (headers / "cutlass.h").write_text("")
    configured(
        f"-DCMAKE_CUDA_COMPILER={stand_in}", f"-DCUTLASS_ROOT={headers.parent}", "-DLRQ_CUDA_ARCHITECTURES=90a",
        "-DLRQ_ONE_OF_EACH=ON", "-DLRQ_DOWNLOAD_TENSORRT=OFF", "-DCMAKE_BUILD_TYPE=Debug",
    )  # fmt: skip
    build = ["cmake", "--build", str(tmp_path), "--target", "launch_wgmma_128_256_lrq_bfloat16"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode != 0
    assert "serialized, see above" in done.stdout + done.stderr
    compiled = [line for line in log.read_text().splitlines() if "wgmma.cu" in line]
    assert len(compiled) == 1
    assert "-DNDEBUG" in compiled[0].split()
