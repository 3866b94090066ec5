"""`lrq-export plugins`: what it asks of CMake, what it says when something is missing, and which library is found.

CMake is a script here: what the real one makes of the sources is for tests/plugins.
"""

import json
import os
from pathlib import Path

import pytest

from lrq_export import kernels, plugins
from lrq_export.errors import MissingError
from lrq_export.serving import repository

CONFIGURED = "-- core: fine"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cmake(tmp_path, monkeypatch):
    """Stand a script in for cmake, in a path with a compiler and nothing else; returns where it keeps its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    arguments = tmp_path / "arguments"

    def install(configure, compile_="", code=0):
        script = folder / "cmake"
        script.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" >> {arguments}\n'
            f'if [ "$1" = --build ]; then\n{compile_ or ":"}\nelse\n{configure}\nfi\nexit {code}\n'
        )
        script.chmod(0o755)
        (folder / "c++").write_text("")
        (folder / "c++").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
        monkeypatch.delenv("CXX", raising=False)
        return arguments

    return install


def test_what_is_built_is_found_and_printed(cache, cmake, cli):
    library = plugins.default_folder() / "lib" / plugins.LIBRARY
    arguments = cmake(f'echo "{CONFIGURED}"', f'echo "[1/2] Building a.o"; echo "[2/2] Linking"; touch {library}')
    assert plugins.find_library() is None
    built = cli("plugins", "build", "--architectures", "89", "90a", "-D", "LRQ_ONE_OF_EACH=ON")
    assert (built.code, built.out) == (0, f"{library}\n")
    assert plugins.find_library() == library
    assert cli("plugins", "path").out == f"{library}\n"
    given = arguments.read_text().splitlines()
    assert {"-DLRQ_CUDA_ARCHITECTURES=89;90a", "-DLRQ_ONE_OF_EACH=ON", str(plugins.sources())} <= set(given)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library that is named, beside it one that it needs, and a link to it from elsewhere."""
    path = tmp_path / "far" / "lib" / plugins.LIBRARY
    path.parent.mkdir(parents=True)
    path.touch()
    path.with_name(plugins.KERNELS).touch()
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / plugins.LIBRARY).symlink_to(path)
    monkeypatch.setenv(plugins.VARIABLE, str(path))
    return path


@pytest.mark.parametrize("place", [".", "..", "../..", f"../{plugins.KERNELS}"])
@pytest.mark.parametrize("linked", [False, True])
def test_code_that_everyone_may_change_is_refused(library, cli, monkeypatch, place, linked):
    """The library, its folders, and the kernels that the loader finds beside it; through a link, too."""
    if linked:
        monkeypatch.setenv(plugins.VARIABLE, str(library.parents[2] / "near" / plugins.LIBRARY))
    assert cli("plugins", "path").code == 0
    writable = Path(os.path.normpath(library / place))
    mode = writable.stat().st_mode
    writable.chmod(mode | 0o002)
    cli("plugins", "path").refused(4, f"{writable}: everyone on this machine may change it", f"chmod o-w {writable}")
    writable.chmod(mode)
    assert cli("plugins", "path").code == 0


@pytest.mark.parametrize("kind", ["file", "folder", "needed", "beside the link"])
def test_every_link_on_the_way_is_looked_at(library, tmp_path, monkeypatch, kind):
    """A link in a folder that everyone may write can be turned, whatever it leads to now."""
    changeable = tmp_path / "open"
    changeable.mkdir()
    if kind == "file":
        (changeable / plugins.LIBRARY).symlink_to(library)
        (tmp_path / "near" / plugins.LIBRARY).unlink()
        (tmp_path / "near" / plugins.LIBRARY).symlink_to(changeable / plugins.LIBRARY)
        monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "near"))
    elif kind == "folder":
        (changeable / "lib").symlink_to(library.parent)
        (tmp_path / "lib").symlink_to("open/lib")
        monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "lib"))
    elif kind == "beside the link":
        (changeable / plugins.KERNELS).touch()
        (tmp_path / "near" / plugins.KERNELS).symlink_to(changeable / plugins.KERNELS)
        monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "near"))
    else:
        kernels_there = library.with_name(plugins.KERNELS)
        kernels_there.rename(changeable / plugins.KERNELS)
        kernels_there.symlink_to(f"../../open/{plugins.KERNELS}")
    assert plugins.find_library() is not None
    changeable.chmod(0o777)
    with pytest.raises(MissingError, match="everyone"):
        plugins.find_library()


def test_a_library_that_is_none_is_missing(library, tmp_path):
    (tmp_path / "circle.so").symlink_to("circle.so")
    for path in (tmp_path / "circle.so", tmp_path / "none.so", tmp_path):
        with pytest.raises(MissingError, match="no such library"):
            plugins.check_code(path)


def test_folders_of_all_in_which_each_keeps_his_own_are_fine(library):
    """As /tmp is; but not for the library's own, where a library that it needs could be added."""
    library.parents[1].chmod(0o1777)
    assert plugins.find_library() == library
    library.parent.chmod(0o1777)
    with pytest.raises(MissingError, match="everyone"):
        plugins.find_library()


def test_named_kernels_and_those_for_triton_are_held_to_it_too(library, package, monkeypatch):
    monkeypatch.setenv(kernels.ENVIRONMENT, str(library.with_name(plugins.KERNELS)))
    assert kernels.find_library() == library.with_name(plugins.KERNELS)
    monkeypatch.setattr(repository, "serves_plan", lambda *_: True)
    repository.check_plan(package, repository.Layout("tiny", plugins=(library,)))
    library.with_name(plugins.KERNELS).chmod(0o666)
    with pytest.raises(MissingError, match="everyone"):
        kernels.find_library()
    with pytest.raises(MissingError, match="everyone"):
        repository.check_plan(package, repository.Layout("tiny", plugins=(library,)))


def test_another_folder_and_json(cache, cmake, cli, tmp_path):
    cmake(f'echo "{CONFIGURED}"; echo "-- lrq_plugins_trt11: left out: no libnvinfer (set LRQ_NVINFER)"',
          f'echo "[ 40%] Building a.o"; touch {tmp_path}/out/lib/{plugins.LIBRARY}')  # fmt: skip
    built = cli("plugins", "build", "-o", tmp_path / "out", "--json")
    lines = [json.loads(line) for line in built.out.splitlines()]
    assert [line["done"] for line in lines if line["event"] == "advance"] == list(range(1, 41))
    assert lines[-1]["libraries"] == [str(tmp_path / "out" / "lib" / plugins.LIBRARY)]
    assert lines[-1]["left_out"] == ["lrq_plugins_trt11: left out: no libnvinfer (set LRQ_NVINFER)"]


@pytest.mark.parametrize(
    ("said", "parts", "compiles"),
    [
        ("-- kernels: left out: no CUDA compiler (put nvcc on the path)", ["no CUDA compiler", "put nvcc on the path"],
         True),
        ("-- trt: left out: no TensorRT headers (set TENSORRT_ROOT)", ["no TensorRT headers", "set TENSORRT_ROOT"],
         False),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_with_what_to_do(cache, cmake, cli, said, parts, compiles):
    """Without CUDA the core is compiled all the same; kernels, which take long, are not if the plugins cannot be."""
    arguments = cmake(f'echo "{said}"', "true")
    cli("plugins", "build").refused(4, *parts)
    assert ("--build" in arguments.read_text()) == compiles


def test_a_compiler_that_fails_is_quoted(cache, cmake, cli):
    cmake(f'echo "{CONFIGURED}"', 'echo "a.cu: error: no such thing"; exit 2')
    cli("plugins", "build").refused(1, "compiling the plugins failed", "a.cu: error: no such thing")


def test_without_cmake_its_package_is_named(cache, cli, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    cli("plugins", "build").refused(4, "cmake is not installed", "pip install cmake")


@pytest.mark.parametrize("wrong", ["75", "sm_90", "90"])
def test_an_architecture_without_kernels_is_refused(cache, cmake, cli, wrong):
    cmake("true")
    cli("plugins", "build", "--architectures", wrong).refused(2, wrong, "90a")


def test_without_plugins_the_command_that_makes_them_is_named(cache, cli):
    cli("plugins", "path").refused(4, "lrq-export plugins build")


def test_a_named_library_wins(cache, monkeypatch, tmp_path):
    library = tmp_path / plugins.LIBRARY
    library.touch()
    for name in (tmp_path, library):
        monkeypatch.setenv(plugins.VARIABLE, str(name))
        assert plugins.find_library() == library
    library.unlink()
    with pytest.raises(MissingError, match="is not there"):
        plugins.find_library()


def test_edited_sources_have_a_folder_of_their_own(cache, monkeypatch, copy_of):
    before = plugins.default_folder()
    copy = copy_of(plugins.sources())
    monkeypatch.setattr(plugins, "sources", lambda: copy)
    assert plugins.default_folder() == before
    (copy / "CMakeLists.txt").write_text("")
    assert plugins.default_folder() != before


def test_the_gpus_of_the_machine_are_the_default(tmp_path, monkeypatch):
    query = tmp_path / "nvidia-smi"
    query.write_text("#!/bin/sh\necho 9.0; echo 8.6; echo 9.0\n")
    query.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert plugins._architectures(None) == ("90a", "86")
    query.write_text("#!/bin/sh\necho 7.5\n")
    assert plugins._architectures(None) == plugins.ARCHITECTURES
    query.unlink()
    assert plugins._architectures(None) == plugins.ARCHITECTURES
