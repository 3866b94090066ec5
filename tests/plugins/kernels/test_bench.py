"""tools/bench_kernels.py runs: every contender of every case once, on small layers, by the emulator."""

import bench_kernels
import pytest
import torch
from bench_kernels import Bar, Report, Result


class FakeBench(bench_kernels.Bench):
    """Calls what it should time."""

    def __init__(self):
        self.report, self.turns, self.called = Report("no GPU", 1), 1, []

    def sets(self, bytes_of_one):
        return 2

    def compare(self, case, contenders, count):
        for name, call in contenders.items():
            self.called.append((case, name, call(count - 1)))
            self.report.results.append(Result(case, name, 1.0, 0.5, 2.0))
        self.report.results.append(self.report.results[-len(contenders)])
        return dict.fromkeys(contenders, 1.0)


@pytest.fixture
def bench(ops_on_cpu, monkeypatch):
    small = {
        "DEVICE": "cpu", "FLUX": {"ffn-up": (16, 128), "ffn-down": (8, 256)}, "FLUX_TOKENS": 3, "PIXART": (16, 128),
        "PIXART_TOKENS": 4, "ROTATIONS": ((256, 128),), "FEW": (16, 512), "FEW_TOKENS": (1, 20),
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(bench_kernels, name, value)
    return FakeBench()


@pytest.mark.parametrize("case", bench_kernels.CASES)
def test_every_contender_of_a_case_runs(bench, case):
    bench_kernels.CASES[case](bench)
    assert bench.called
    assert bench.report.bars
    assert case in bench.report.results[0].case or case == "few"


def test_contenders_compute_the_same(bench):
    """The INT8 baseline and our product of the same codes; whole layers, packed and resident."""
    bench_kernels.bench_product(bench)
    first = {name: y.float() for _, name, y in bench.called[:3]}
    ours, theirs = first["lrq product, INT8 resident"], first["torch._int_mm, then scales and bias"]
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2)
    bench.called.clear()
    bench_kernels.bench_linear(bench)
    packed, resident = (y for _, name, y in bench.called[:2])
    assert torch.equal(packed, resident)


def test_a_missed_bar_is_seen():
    assert Bar("speed", 1.5, 1.4).met
    assert not Bar("speed", 1.3, 1.4).met
    assert Bar("times the floor", 1.3, 1.4, at_least=False).met
    assert not Bar("times the floor", 1.5, 1.4, at_least=False).met
    assert "MISSED" in str(Bar("speed", 1.3, 1.4))


def test_the_report_is_a_table(bench):
    bench_kernels.bench_decode(bench)
    lines = bench.report.markdown().splitlines()
    assert lines[2].startswith("| case | contender |")
    assert any("decode 4-bit" in line and "copy" in line and "TB/s" in line for line in lines)


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_kernels.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernels.main() == 4
    assert "nothing was measured" in capsys.readouterr().err
