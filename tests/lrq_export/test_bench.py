"""`lrq-export bench`: what it reports, and when it fails."""

import json

import onnx
import pytest

from lrq_export import bench
from lrq_export.engine.onnxruntime import layer_times, open_session
from lrq_export.errors import CheckFailed, UsageError


@pytest.fixture
def without_memory(monkeypatch):
    """A process for each target takes seconds; one test of its own is enough."""
    monkeypatch.setattr(bench, "peak_bytes", lambda *arguments: 1 << 20)


def test_each_target_and_baseline_has_a_row(package, tiny, cli, without_memory):
    done = cli(
        "bench", package, "--source", tiny.source, "--batch", 1, "--batch", 3, "--runs", 2, "--threads", 1, "--json"
    )
    assert done.code == 0
    rows = [json.loads(line) for line in done.out.splitlines()]
    rows = [row for row in rows if row["event"] == "row"]
    names = ["onnxruntime", "torch fp32", "torch bf16"]
    assert [(row["batch"], row["target"]) for row in rows] == [(batch, name) for batch in (1, 3) for name in names]
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["samples_per_second"] == pytest.approx(1000 * row["batch"] / row["p50_ms"], rel=0.05)
    for row in rows:
        baselines = [other["p50_ms"] for other in rows if other["batch"] == row["batch"] and "torch" in other["target"]]
        assert row["speedup"] == pytest.approx(min(baselines) / row["p50_ms"], abs=1e-3)


def test_without_a_source_there_is_no_baseline(package, cli, without_memory):
    done = cli("bench", package, "--runs", 1, "--threads", 1)
    assert done.code == 0
    assert "onnxruntime" in done.out
    assert "torch" not in done.out
    assert "no baselines in fp32 and bf16: pass --source" in done.out
    cli("bench", package, "--require-speedup", 1).refused(2, "--require-speedup", "pass --source")
    with pytest.raises(UsageError, match="pass --source"):
        bench.open_run(package, "torch fp32", {}, None, None)


def test_a_baseline_is_the_same_model(package, tiny, cli, copy_of, without_memory):
    other = copy_of(tiny.source)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    cli("bench", package, "--source", other).refused(3, "is not the source that", "its fingerprint differs")


def test_a_speedup_that_is_not_reached_fails(package, tiny, cli, without_memory):
    arguments = ("bench", package, "--source", tiny.source, "--runs", 1, "--threads", 1)
    cli(*arguments, "--require-speedup", 1e6).refused(1, "batch 1: onnxruntime is", "needed 1e+06")
    assert cli(*arguments, "--require-speedup", 1e-6).code == 0


def test_every_batch_has_to_reach_the_speedup():
    rows = [{"batch": batch, "target": "onnxruntime", "speedup": speedup} for batch, speedup in ((1, 2.0), (8, 1.1))]
    bench.require_speedup({"rows": rows}, 1.1)
    with pytest.raises(CheckFailed, match=r"batch 8: onnxruntime is 1\.10 times"):
        bench.require_speedup({"rows": rows}, 1.5)


def test_memory_is_that_of_the_target_alone(package):
    assert 1 << 18 < bench.peak_bytes(package, "onnxruntime", 1, 1, None) < 1 << 28


def test_inputs_are_repeated_to_fill_a_batch(package):
    few = bench.inputs_of(package, 2)
    many = bench.inputs_of(package, 50)
    assert all(len(tensor) == 50 for tensor in many.values())
    assert all(bool((many[name][:2] == tensor).all()) for name, tensor in few.items())


def test_layers_of_a_target_are_timed_one_by_one(package, cli, without_memory):
    done = cli("bench", package, "--runs", 3, "--threads", 1, "--layers", "--json")
    layers = [row for row in map(json.loads, done.out.splitlines()) if row["event"] == "layer"]
    times = [row["p50_ms"] for row in layers]
    assert times == sorted(times, reverse=True)
    assert times[0] > 0
    assert sum(row["share"] for row in layers) == pytest.approx(1, abs=0.01)
    assert {(row["batch"], row["target"]) for row in layers} == {(1, "onnxruntime")}
    graph = onnx.load(package / "engine" / "onnxruntime" / "model.onnx", load_external_data=False).graph
    products = sum(node.op_type == "MatMulIntegerToFloat" for node in graph.node)
    assert 0 < products == sum(row["layer"].endswith("(MatMulIntegerToFloat)") for row in layers)


def test_every_run_but_the_first_is_in_every_layer_of_onnx_runtime(package):
    session = open_session(package / "engine/onnxruntime")
    inputs = bench.inputs_of(package, 1)
    fed = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    times = layer_times(package / "engine/onnxruntime", fed, 3, 1)
    assert len(times) > 50
    assert {len(each) for each in times.values()} == {3}


def test_the_slowest_layers_are_shown(package, cli, without_memory):
    shown = cli("bench", package, "--runs", 1, "--threads", 1, "--layers").out
    assert "onnxruntime, batch 1: 20 of" in shown
    assert "layers" not in cli("bench", package, "--runs", 1, "--threads", 1).out
