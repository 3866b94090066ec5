"""plugins/core, compiled with g++ once a session; undefined behaviour in it is reported where g++ can."""

import ctypes
import shutil
import subprocess

import pytest
from core_library import compile_core


@pytest.fixture(scope="session")
def core(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler: install g++")
    folder = tmp_path_factory.mktemp("core")
    try:
        return compile_core(folder, ["-fsanitize=undefined"])
    except (subprocess.CalledProcessError, OSError):
        return compile_core(folder)  # no libubsan on this machine; warnings are still errors


@pytest.fixture
def no_undefined_behaviour(capfd):
    """Fails a test during which UBSan printed something."""
    yield
    assert "runtime error" not in capfd.readouterr().err
