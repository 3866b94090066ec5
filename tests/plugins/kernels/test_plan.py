"""How products are cut up (plugins/kernels/plan.h), by a compiled program of static assertions and a sweep."""

import subprocess

import pytest
from kernel_machine import KERNELS

PROGRAM = r"""
#include <cmath>
#include <cstdio>

#include "plan.h"

using namespace lrq;

constexpr uint32_t kAll = 1u << LRQ_TILE_128_256 | 1u << LRQ_TILE_128_128 | 1u << LRQ_TILE_64_256 |
                          1u << LRQ_TILE_64_192 | 1u << LRQ_TILE_64_128;

constexpr double efficiency(int32_t tactic, int64_t tokens, int64_t rows) {
    return waveEfficiency(*tileShapeOf(tactic), tokens, rows, 132, 1);
}

// A small layer on 132 processors: 0.55 with either large tile, 0.73 with 64 x 192.
static_assert(std::abs(efficiency(LRQ_TILE_128_256, 2048, 1152) - 0.545) < 0.001, "");
static_assert(std::abs(efficiency(LRQ_TILE_128_128, 2048, 1152) - 0.545) < 0.001, "");
static_assert(std::abs(efficiency(LRQ_TILE_64_192, 2048, 1152) - 0.727) < 0.001, "");
static_assert(chooseTile(kAll, 2048, 1152, 132, 2) == LRQ_TILE_64_192, "");
static_assert(chooseTile(kAll, 4608, 12288, 132, 2) == LRQ_TILE_128_256, "a large layer takes the large tile");
static_assert(chooseTile(1u << LRQ_TILE_64_128, 4608, 12288, 132, 2) == LRQ_TILE_64_128, "of those there are");
static_assert(chooseTile(0, 4608, 12288, 132, 2) == LRQ_AUTO, "none");
static_assert(tileShapeOf(LRQ_FEW_TOKENS) == nullptr && tileShapeOf(99) == nullptr, "");

static_assert(rowsDecodedAtOnce(12288, 3072) == 6144, "two equal parts of 18 MB");
static_assert(rowsDecodedAtOnce(3072, 12288) == 1536, "");
static_assert(rowsDecodedAtOnce(1152, 1152) == 1152, "what fits is not cut");
static_assert(rowsDecodedAtOnce(21504, 3072) == 7168, "");
static_assert(rowsDecodedAtOnce(600, 131071) == 256, "at least a tile, however wide");

static_assert(planWorkspace(0, 64, 64, true, false).bytes == 0, "");
static_assert(planWorkspace(5, 64, 100, true, true).tokenScales == 512, "500 bytes of codes");
static_assert(planWorkspace(5, 64, 100, true, true).decoded == 768, "20 bytes of scales");
static_assert(planWorkspace(5, 64, 100, true, true).bytes == 768 + 6400, "");
static_assert(planWorkspace(5, 64, 100, false, false).bytes == 0, "");

bool partsCover(int64_t rows, int64_t cols) {
    int64_t const most = rowsDecodedAtOnce(rows, cols);
    bool const fits = most * cols <= kMostDecodedBytes || most == kShareOfRows;
    bool const isWholeTiles = most == rows || most % kShareOfRows == 0;
    return most > 0 && most <= rows + kShareOfRows && fits && isWholeTiles;
}

int main() {
    int bad = 0;
    for (int64_t rows = 8; rows < 40000; rows += 168) {
        for (int64_t cols = 16; cols < 131072; cols = cols * 3 / 2) {
            bad += !partsCover(rows, cols);
            double const rate = efficiency(chooseTile(kAll, cols, rows, 132, 2), cols, rows);
            bad += !(rate > 0.0 && rate <= 1.0);
        }
    }
    std::printf("%d\n", bad);
    return bad != 0;
}
"""


def test_tiles_parts_and_workspaces_are_as_planned(tmp_path):
    assert compiled(tmp_path, PROGRAM) == "0\n"


@pytest.mark.parametrize(
    ("true", "false"),
    [("(12288, 3072) == 6144", "(12288, 3072) == 8192"), ("== LRQ_TILE_64_192", "== LRQ_TILE_128_128")],
)
def test_a_wrong_expectation_does_not_compile(tmp_path, true, false):
    assert true in PROGRAM
    assert compiled(tmp_path, PROGRAM.replace(true, false)) is None


def compiled(folder, program):
    """What the program prints, None if it does not compile."""
    source, target = folder / "plan.cpp", folder / "plan"
    source.write_text(program)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}"]
    built = subprocess.run(["g++", *flags, str(source), "-o", str(target)], capture_output=True, text=True)
    if built.returncode:
        assert "static assertion" in built.stderr, built.stderr
        return None
    return subprocess.run([str(target)], capture_output=True, text=True, check=True).stdout
