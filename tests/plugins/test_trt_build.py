"""Which headers CMake takes and what it says without any; and the library that registers the plugins by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import trt_build

from graphs.ops import OPS

PROJECT = f"""
cmake_minimum_required(VERSION 3.18)
project(headers LANGUAGES NONE)
set(CMAKE_FIND_USE_CMAKE_SYSTEM_PATH OFF)  # a system that has TensorRT's headers would hide the rest
set(CMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH ON)
include({trt_build.TRT / "FindTensorRT.cmake"})
message(STATUS "taken ${{TENSORRT_INCLUDE}} ${{TENSORRT_MAJOR}}.${{TENSORRT_MINOR}}")
message(STATUS "missing ${{TENSORRT_MISSING}}")
"""


def write_headers(folder, major, minor):
    folder.mkdir(parents=True)
    (folder / "NvInfer.h").touch()
    if major >= 11:  # as NVIDIA writes them
        text = f"#define TRT_MAJOR_ENTERPRISE {major}\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< major\n"
    else:
        text = f"#define NV_TENSORRT_MAJOR {major} //!< major\n"
    (folder / "NvInferVersion.h").write_text(f"{text}#define NV_TENSORRT_MINOR {minor} //!< minor\n")
    return folder


@pytest.fixture
def configure(tmp_path):
    """Configure a project that looks for headers, the user's cache folder below tmp_path; returns what it said."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake: pip install cmake")
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)

    def run(*definitions, **environment):
        command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", *(f"-D{each}" for each in definitions)]
        own = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        variables = {name: value for name, value in os.environ.items() if name != "TENSORRT_ROOT"}
        done = subprocess.run(command, capture_output=True, text=True, env=variables | own | environment, check=True)
        taken, missing = (
            next(line.partition(f"-- {word}")[2].strip() for line in done.stdout.splitlines() if f"-- {word}" in line)
            for word in ("taken", "missing")
        )
        return taken, missing

    return run


@pytest.fixture
def cached(tmp_path):
    return tmp_path / "cache" / "lrq-export" / "tensorrt"


NO_DOWNLOAD = "LRQ_DOWNLOAD_TENSORRT=OFF"


def test_the_newest_cached_headers_are_taken(configure, cached):
    write_headers(cached / "v10.7.0" / "include", 10, 7)
    newest = write_headers(cached / "v11.1" / "include", 11, 1)
    write_headers(cached / "v9.9" / "include", 9, 9)
    assert configure(NO_DOWNLOAD) == (f"{newest} 11.1", "")


def test_tensorrt_root_wins(configure, cached, tmp_path):
    write_headers(cached / "v11.1" / "include", 11, 1)
    root = write_headers(tmp_path / "root" / "include", 10, 16)
    assert configure(TENSORRT_ROOT=str(tmp_path / "root")) == (f"{root} 10.16", "")


def test_another_tensorrt_root_is_taken_the_next_time(configure, cached, tmp_path):
    write_headers(cached / "v11.1" / "include", 11, 1)
    assert configure()[0].endswith("11.1")
    root = write_headers(tmp_path / "root" / "include", 10, 16)
    assert configure(TENSORRT_ROOT=str(tmp_path / "root")) == (f"{root} 10.16", "")


def test_a_wrong_tensorrt_root_is_not_passed_over(configure, cached, tmp_path):
    write_headers(cached / "v11.1" / "include", 11, 1)
    assert "TENSORRT_ROOT has no include/NvInfer.h" in configure(TENSORRT_ROOT=str(tmp_path / "nowhere"))[1]


def test_old_headers_are_refused(configure, tmp_path):
    write_headers(tmp_path / "root" / "include", 10, 6)
    assert "10.6, needed 10.7 or newer" in configure(f"TENSORRT_ROOT={tmp_path / 'root'}")[1]


def test_without_headers_it_says_where_to_put_them(configure, cached):
    _, missing = configure(NO_DOWNLOAD)
    assert "set TENSORRT_ROOT" in missing
    assert str(cached) in missing


def test_a_download_that_fails_leaves_nothing_behind(configure, cached, tmp_path):
    _, missing = configure(f"LRQ_TENSORRT_REPOSITORY=file://{tmp_path}/nowhere")
    assert "could not be downloaded" in missing
    assert list(cached.iterdir()) == []


def test_headers_are_downloaded_once(configure, cached, tmp_path):
    repository = tmp_path / "repository"
    write_headers(repository / "include", 11, 1)
    (repository / "large").mkdir()
    (repository / "large" / "file").write_text("not for us")
    git = ["git", "-C", repository, "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "m"], ["tag", "v11.1"]):
        subprocess.run([*git, *arguments], check=True)
    downloaded = cached / "v11.1"
    assert configure(f"LRQ_TENSORRT_REPOSITORY=file://{repository}") == (f"{downloaded / 'include'} 11.1", "")
    assert [path.name for path in downloaded.iterdir()] == ["include"]
    shutil.rmtree(repository)
    shutil.rmtree(tmp_path / "build")
    assert configure(NO_DOWNLOAD) == (f"{downloaded / 'include'} 11.1", "")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    trt_build.skip_if_missing()
    return trt_build.build_library(tmp_path_factory.mktemp("library"), trt_build.all_headers()[0])


@pytest.mark.parametrize("major", [10, 11])
def test_a_program_that_merely_opens_the_library_gets_the_plugins(major, library, tmp_path):
    """polygraphy's and ONNX Runtime's way: dlopen. libnvinfer is one of ours that keeps what it is told."""
    headers = [each for each in trt_build.all_headers() if each.version[0] == major]
    if not headers:
        pytest.skip(f"needs the headers of TensorRT {major}")
    shared = ["-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-deprecated-declarations"]
    nvinfer, registering = tmp_path / "libnvinfer.so", tmp_path / "liblrq_registering.so"
    trt_build.compile_together([trt_build.HOST / "fake_nvinfer.cpp"], headers[-1], *shared, "-o", str(nvinfer))
    linked = [str(library), str(nvinfer), f"-Wl,-rpath,{library.parent}:{tmp_path}"]
    trt_build.compile_together([trt_build.TRT / "register.cpp"], headers[-1], *shared, "-o", str(registering), *linked)
    code = (
        "import ctypes, sys\n"
        "ctypes.CDLL(sys.argv[1])\n"
        "names = ctypes.CDLL(sys.argv[2]).registeredNames\n"
        "names.restype = ctypes.c_char_p\n"
        "print(names().decode(), end='')"
    )
    opened = subprocess.run([sys.executable, "-c", code, registering, nvinfer], capture_output=True, text=True)
    assert opened.stdout.splitlines() == [f"{name}|" for name in OPS], opened.stderr
