"""tools/bench_kernels.py runs: every contender of every case once, on small layers, by the emulator."""

import weakref

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
        "PIXART_TOKENS": 4, "ROTATIONS": ((256, 128),), "WHOLE_ROTATIONS": (768, 48), "FEW": (16, 512),
        "FEW_TOKENS": (1, 20),
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


class TimedBench(bench_kernels.Bench):
    """Replays take what a list says; all that is made of it is the tool's own."""

    def __init__(self, turns, times):
        self.report, self.turns, self.cold_bytes, self.times = Report("no GPU", turns), turns, 100, times

    def _capture(self, call, count):
        return {call(index) for index in range(count)}.pop()

    def _replay(self, graph):
        return self.times[graph].pop(0)


def test_times_are_of_one_call_and_contenders_take_turns():
    times = {"ours": [10.0, 90.0, 20.0, 90.0, 60.0, 90.0], "theirs": [40.0, 50.0, 60.0]}
    bench = TimedBench(3, times)
    found = bench.compare("case", {name: lambda _, name=name: name for name in times}, 2)
    assert found == {"ours": 10.0, "theirs": 25.0}, "medians; the first contender's second place is apart"
    assert [(r.contender, r.median, r.note) for r in bench.report.results] == [
        ("ours", 10.0, ""), ("theirs", 25.0, ""), ("ours", 45.0, "again"),
    ]  # fmt: skip
    assert (bench.report.results[0].p10, bench.report.results[0].p90) == pytest.approx((6, 26))


@pytest.mark.parametrize(("bytes_of_one", "sets"), [(1000, 2), (50, 2), (49, 3), (10, 10), (0, 100)])
def test_buffers_are_more_than_what_stays_in_l2(bytes_of_one, sets):
    assert TimedBench(1, {}).sets(bytes_of_one) == sets


def test_a_replay_is_timed_between_events_in_microseconds(monkeypatch):
    """torch.cuda's events, streams and graphs are stood in for: in what order they are used is what is tested."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("synchronize")

        def elapsed_time(self, stop):
            assert stop is not self
            return 0.25  # ms

    class Graph:
        def replay(self):
            done.append("replay")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert bench_kernels.Bench._replay(None, Graph()) == 250.0
    assert done == ["record", "replay", "record", "synchronize"]


def test_a_capture_holds_every_buffer_and_writes_memory_of_its_own(monkeypatch):
    """Stood in for as above: first calls on a stream of their own, then all sets, their results kept apart."""
    done, alive = [], []

    class Scope:
        def __init__(self, *_):
            pass

        def __enter__(self):
            done.append("captured" if isinstance(self, Capture) else "warm")

        def __exit__(self, *_):
            done.append("end")
            alive.append(sum(one() is not None for one in results[-4:]))

        def synchronize(self):
            done.append("synchronize")

    class Capture(Scope):
        pass

    results = []

    def call(index):
        done.append(index)
        result = torch.empty(1)
        results.append(weakref.ref(result))
        return result

    monkeypatch.setattr(torch.cuda, "Stream", Scope)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    assert bench_kernels.Bench._capture(None, call, 4) == "graph"
    assert done == ["warm", 0, 1, 2, "end", "synchronize", "captured", 0, 1, 2, 3, "end"]
    assert alive[-1] == 4, "what one call wrote was free for the next"


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
