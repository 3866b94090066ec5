"""The fuzz target of plugins/core finds nothing under AddressSanitizer and UBSan, and does find what is planted.

Seeded random bytes through a stand-alone driver: a few seconds of what `tools/fuzz_core` does with libFuzzer.
"""

import shutil
import subprocess

import pytest
from core_library import CORE, FLAGS

SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
RUNS = 8000

# what is broken: file of plugins/core, text in it, what replaces that, what has to be reported
PLANTED = {
    "the size of codes is not checked": (
        "c_api_weight.cpp",
        "return weight->codesBytes == needed ? Status::kOk : Status::kBadSize;",
        "return needed > 0 ? Status::kOk : Status::kBadSize;",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "fraction bits are not checked": (
        "decode.h",
        "return fractionBits >= 0 && fractionBits <= kMaxFractionBits && integerBits >= 0 &&",
        "return fractionBits >= 0 && integerBits >= 0 &&",
        "runtime error: ",
    ),
    "a byte permutation is wrong": ("table_decode.h", "0x7362", "0x7326", "decode differently"),
}


def fuzz(core, folder):
    """Compiles the core in folder `core` with its fuzz target, and runs it."""
    program = folder / "fuzz_core"
    sources = [str(path) for path in (*sorted(core.glob("*.cpp")), *sorted((core / "fuzz").glob("*.cpp")))]
    command = ["g++", *FLAGS, *SANITIZERS, "-O0", f"-I{core}", *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([program, f"-runs={RUNS}"], capture_output=True, text=True)


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler: install g++")
    empty = tmp_path_factory.mktemp("sanitizers") / "empty.cpp"
    empty.write_text("int main() {}\n")
    compiled = subprocess.run(["g++", *SANITIZERS, str(empty), "-o", str(empty.with_suffix(""))], capture_output=True)
    if compiled.returncode != 0 or subprocess.run([empty.with_suffix("")], capture_output=True).returncode != 0:
        pytest.skip("needs AddressSanitizer and UBSan: install libasan and libubsan, which come with g++")


def test_sanitizers_find_nothing(sanitizers, tmp_path):
    ran = fuzz(CORE, tmp_path)
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (0, f"{RUNS} runs without a finding"), ran.stderr


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found(sanitizers, tmp_path, planted):
    file, text, replacement, report = PLANTED[planted]
    broken = tmp_path / "core"
    shutil.copytree(CORE, broken)
    source = (broken / file).read_text()
    assert source.count(text) == 1
    (broken / file).write_text(source.replace(text, replacement))
    ran = fuzz(broken, tmp_path)
    assert ran.returncode != 0
    assert report in ran.stderr
