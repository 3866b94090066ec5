"""`lrq-export bench`: what it reports, and when it fails."""

import json
import subprocess
from types import SimpleNamespace

import onnx
import pytest
import torch

from lrq_export.bench import contenders, memory
from lrq_export.bench.contenders import BASELINES, Contender, inputs_of, until_done
from lrq_export.bench.memory import Job
from lrq_export.bench.run import bench, require_speedup
from lrq_export.doctor.system import Driver
from lrq_export.engine import run_obstacle
from lrq_export.engine.onnxruntime import layer_times, open_session
from lrq_export.errors import CheckFailed, MissingError, UsageError
from lrq_export.machine import describe_gpus
from lrq_export.serve_command import _show_bench


@pytest.fixture(autouse=True)
def the_number_of_threads_stays():
    """`--threads` is of the process, and another number is another build to what is tested after."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_memory(monkeypatch):
    """A process for each target takes seconds; one test of its own is enough."""
    sizes = {"peak_mib": 1.0, "device_mib": None}
    monkeypatch.setattr(Job, "in_its_own_process", lambda job: sizes)


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


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--require-speedup", "nan"], 2, "needed a number above 0"),
        (["--require-speedup", "inf"], 2, "needed a number above 0"),
        (["--require-speedup", "-1"], 2, "needed a number above 0"),
        (["--threads", "1025"], 2, "--threads"),
        (["--batch", str(10**9)], 4, "try a smaller batch"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(package, tiny, cli, arguments, code, part):
    cli("bench", package, "--source", tiny.source, *arguments).refused(code, part)


def test_every_figure_is_shown_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = {"batch": 16, "target": "tensorrt-rtx", "device": "cuda:0", "p50_ms": 1234.56, "p90_ms": 2345.67}
    row |= {"p99_ms": 3456.78, "samples_per_second": 12.96, "peak_mib": 12345.6, "device_mib": 23456.7, "speedup": 1.25}
    _show_bench([row | {"note": None}])
    shown = capsys.readouterr().out
    figures = ("tensorrt-rtx", "cuda:0", "1,234.56", "2,345.67", "3,456.78", "12.96", "12,346", "23,457", "1.25")
    assert [figure for figure in figures if figure not in shown] == []
    assert max(map(len, shown.splitlines())) <= 80


def test_a_baseline_is_the_same_model(package, tiny, cli, copy_of, without_memory):
    other = copy_of(tiny.source)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    cli("bench", package, "--source", other).refused(3, "is not the source that", "its fingerprint differs")


def test_a_speedup_that_is_not_reached_fails(package, tiny, cli, without_memory):
    arguments = ("bench", package, "--source", tiny.source, "--runs", 1, "--threads", 1)
    cli(*arguments, "--require-speedup", 1e6).refused(1, "batch 1: onnxruntime is", "needed 1e+06")
    assert cli(*arguments, "--require-speedup", 1e-6).code == 0


def row(batch, target, p50, speedup, device="cpu", note=None):
    return {"batch": batch, "target": target, "p50_ms": p50, "speedup": speedup, "device": device, "note": note}


def test_every_batch_has_to_reach_the_speedup():
    rows = [row(batch, "onnxruntime", 1.0, speedup) for batch, speedup in ((1, 2.0), (8, 1.1))]
    require_speedup({"rows": rows}, 1.1)
    with pytest.raises(CheckFailed, match=r"batch 8: onnxruntime is 1\.10 times"):
        require_speedup({"rows": rows}, 1.5)


def test_a_processor_does_not_answer_for_a_gpu():
    rows = [row(1, "onnxruntime", 90.0, 3.0), row(1, "tensorrt", 2.0, 1.2, "cuda:0")]
    require_speedup({"rows": rows}, 1.2)
    with pytest.raises(CheckFailed, match=r"tensorrt is 1\.20 times as fast as the fastest baseline on cuda:0"):
        require_speedup({"rows": rows}, 1.3)


def test_a_speedup_that_nothing_shows_is_not_reached():
    rows = [row(1, "onnxruntime", 1.0, 2.0), row(4, "tensorrt", None, None, None, "no profile takes 4")]
    with pytest.raises(CheckFailed, match="batch 4: there is no speedup to judge: no profile takes 4"):
        require_speedup({"rows": rows}, 1.0)


def test_a_baseline_that_did_not_run_leaves_nothing_to_judge():
    rows = [row(1, "tensorrt", 1.0, 4.0, "cuda:0"), row(1, "torch fp32", 4.0, 1.0, "cuda:0")]
    require_speedup({"rows": rows}, 2.0)
    rows.append(row(1, "torch bf16", None, None, "cuda:0", "torch bf16: the GPU has too little memory"))
    with pytest.raises(CheckFailed, match="batch 1: a baseline did not run: torch bf16: the GPU has too little memory"):
        require_speedup({"rows": rows}, 2.0)
    with pytest.raises(CheckFailed, match="no target of the package can run here"):
        require_speedup({"rows": []}, 2.0)


def test_what_a_library_raises_is_a_note_of_its_row(package, tiny, with_a_plan, without_memory, monkeypatch):
    """A baseline that two devices refuse has a row of each."""
    opened = contenders._open_baseline

    def refuse(package, name, *more):
        if name == "torch bf16":
            raise RuntimeError("no kernel\nfor this")
        return opened(package, name, *more)

    monkeypatch.setattr(contenders, "_open_baseline", refuse)
    rows = bench(package, source=tiny.source, batches=(1,), runs=1, threads=1)["rows"]
    noted = [(row["target"], row["device"], row["note"]) for row in rows if row["note"]]
    assert noted == [
        ("torch bf16", device, "torch bf16: RuntimeError: no kernel for this") for device in ("meta", "cpu")
    ]


def test_an_engine_that_cannot_run_here_is_told(package, copy_of, reseal, plan_of, monkeypatch):
    """It is in the package: left out without a word, its row would be missed."""
    folder = copy_of(package)
    (folder / "engine/tensorrt").mkdir()
    (folder / "engine/tensorrt/model.plan").write_bytes(plan_of("tensorrt", "10.16"))
    built = {"target": "tensorrt", "version": "10.16", "plugins": False}
    (folder / "engine/tensorrt/build.json").write_text(json.dumps(built))
    reseal(folder)
    monkeypatch.setattr(run_obstacle, "installed_tensorrt", lambda *_: "11.1")
    rows = bench(folder, batches=(1,), runs=1, threads=1)["rows"]
    assert [(row["target"], row["note"] is None) for row in rows] == [("onnxruntime", True), ("tensorrt", False)]
    assert "the engine is of tensorrt 10.16, the library here is 11.1" in rows[1]["note"]


@pytest.fixture
def with_a_plan(monkeypatch):
    """A second target, for batches up to 2, on torch's device without storage: it stands in for a GPU."""
    load, obstacle = contenders.load, contenders.obstacle
    meta = torch.device("meta")

    class Plan:
        device = meta

        def __init__(self, specs):
            self.specs = specs

        def run(self, inputs):
            assert {tensor.device for tensor in inputs.values()} == {meta}
            if len(inputs["timestep"]) > 2:
                raise UsageError("no optimization profile of the plan takes timestep (3,)")

    def load_or_fake(package, target, threads):
        opened = load(package, target="onnxruntime", threads=threads)
        return Plan(opened.specs) if target == "tensorrt" else opened

    monkeypatch.setattr(contenders, "load", load_or_fake)
    monkeypatch.setattr(contenders, "obstacle", lambda package, target: obstacle(package, "onnxruntime") if
                        target in ("tensorrt", "onnxruntime") else MissingError("not built"))  # fmt: skip


def test_baselines_run_where_the_targets_do(package, tiny, with_a_plan, without_memory):
    rows = bench(package, source=tiny.source, batches=(1,), runs=1, threads=1)["rows"]
    assert [(row["target"], row["device"]) for row in rows] == [
        ("tensorrt", "meta"), ("onnxruntime", "cpu"),
        ("torch fp32", "meta"), ("torch bf16", "meta"), ("torch fp32", "cpu"), ("torch bf16", "cpu"),
    ]  # fmt: skip
    for device in ("meta", "cpu"):
        alike = [row for row in rows if row["device"] == device]
        fastest = min(row["p50_ms"] for row in alike if row["target"] in BASELINES)
        for each in alike:
            assert each["speedup"] == pytest.approx(fastest / each["p50_ms"], abs=1e-3)


def test_a_baseline_computes_on_the_device_it_names(package, tiny):
    meta = torch.device("meta")
    opened = contenders.open_contender(package, "torch bf16", inputs_of(package, 1), 1, tiny.source, meta)
    answer = opened.run()
    assert (answer.device, answer.dtype) == (meta, torch.bfloat16)


def test_a_batch_that_no_profile_takes_leaves_the_others_their_rows(package, with_a_plan, without_memory, cli):
    rows = bench(package, batches=(1, 3), runs=1, threads=1)["rows"]
    notes = {(row["batch"], row["target"]): row["note"] for row in rows}
    assert notes.pop((3, "tensorrt")) == "no optimization profile of the plan takes timestep (3,)"
    assert notes == dict.fromkeys([(1, "tensorrt"), (1, "onnxruntime"), (3, "onnxruntime")])
    done = cli("bench", package, "--batch", 3, "--runs", 1, "--threads", 1)
    assert done.code == 0
    assert "batch 3, tensorrt: no optimization profile of the plan takes timestep (3,)" in done.out


def test_a_package_without_any_engine_is_an_error(package, copy_of, reseal, cli):
    bare = copy_of(package)
    (bare / "engine/onnxruntime/session.json").unlink()
    reseal(bare)
    cli("bench", bare).refused(4, "the package holds no ONNX Runtime engine", "lrq-export build")


def test_what_measured_nothing_is_an_error(package, monkeypatch, without_memory):
    def refuse(*arguments, **options):
        raise MissingError("the plugins are not compiled")

    monkeypatch.setattr(contenders, "load", refuse)
    with pytest.raises(MissingError, match="not compiled"):
        bench(package, runs=1)


@pytest.mark.parametrize(("device", "order"), [("cuda", ["run", "cuda"]), ("cpu", ["run"])])
def test_a_run_on_a_gpu_is_timed_until_it_is_done(monkeypatch, device, order):
    told = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append(str(device)))
    until_done(lambda: told.append("run"), torch.device(device))()
    assert told == order


def test_memory_is_that_of_the_target_alone(package):
    found = Job(str(package), "onnxruntime", 1, 1, None, "cpu").in_its_own_process()
    assert 0.25 < found["peak_mib"] < 256
    assert found["device_mib"] is None


def test_memory_of_a_gpu_is_what_became_less_there(package, monkeypatch):
    left = iter([900 << 20, 300 << 20])
    monkeypatch.setattr(memory, "free_on", lambda device: next(left))
    monkeypatch.setattr(memory, "open_contender", lambda *arguments: Contender("tensorrt", arguments[-1], list))
    assert Job(str(package), "tensorrt", 1, None, None, "cuda:0").measure()["device_mib"] == 600 << 20


def test_a_process_that_measures_no_memory_says_why(monkeypatch):
    failed = subprocess.CompletedProcess([], -9, "", "Traceback ...\nRuntimeError: out of memory\n\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    found = Job("package", "tensorrt", 1, None, None, "cuda:0").in_its_own_process()
    assert (found["peak_mib"], found["device_mib"]) == (None, None)
    assert "ended with -9: RuntimeError: out of memory" in found["note"]


@pytest.mark.parametrize(("release", "driver"), [("580.65.06\n", "580.65.06"), (None, "of unknown release")])
def test_the_machine_names_its_gpus(release, driver):
    found = Driver((13, 0), (("NVIDIA H200", (9, 0)),))
    system = SimpleNamespace(driver=lambda: found, output=lambda *command: release)
    gpus = [{"name": "NVIDIA H200", "compute_capability": "9.0"}]
    assert describe_gpus(system) == {"gpus": gpus, "driver": f"{driver}, CUDA 13.0"}
    assert describe_gpus(SimpleNamespace(driver=lambda: "cuInit returns 3")) == {}


def test_inputs_are_repeated_to_fill_a_batch(package):
    few = inputs_of(package, 2)
    many = inputs_of(package, 50)
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
    inputs = inputs_of(package, 1)
    fed = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    times = layer_times(package / "engine/onnxruntime", fed, 3, 1)
    assert len(times) > 50
    assert {len(each) for each in times.values()} == {3}


def test_the_slowest_layers_are_shown(package, cli, without_memory):
    shown = cli("bench", package, "--runs", 1, "--threads", 1, "--layers").out
    assert "onnxruntime, batch 1: 20 of" in shown
    assert "layers" not in cli("bench", package, "--runs", 1, "--threads", 1).out
