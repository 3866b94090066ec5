"""The runner of TensorRT plans: what it uses of NVIDIA's classes exists, and in the right order, as far as a stand-in
for a GPU can show. test_trt.py runs real plans.
"""

import ast
import contextlib
import ctypes
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lrq_export.engine import tensorrt_runner, tensorrt_worker
from lrq_export.engine.tensorrt_runner import BUCKETS, TensorRtRunner
from lrq_export.errors import InputError, MissingError, UsageError

BUILT = {"target": "tensorrt", "version": "10.16", "plugins": False}  # of a build.json
# The NVIDIA class behind each name of a variable; "" is the module itself.
CLASSES = {
    "trt": "", "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
    "registry": "IPluginRegistry", "network": "INetworkDefinition", "config": "IBuilderConfig", "layer": "ILayer",
    "inspector": "EngineInspector",
}  # fmt: skip


def uses(source):
    """(class, attribute) for whatever the source reads of NVIDIA's module and objects; enums as (enum, member).

    So are the methods of its own classes that are derived from NVIDIA's: it calls those by name.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            bases = [base.attr for base in node.bases if isinstance(base, ast.Attribute) and base.value.id == "trt"]
            found |= {(base, each.name) for base in bases for each in node.body if isinstance(each, ast.FunctionDef)}
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id in CLASSES:
            found.add((CLASSES[owner.id], node.attr))
        elif isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "trt":
            found.add((owner.attr, node.attr))
    return found


def absent(module, source):
    return [
        f"{owner}.{name}"
        for owner, name in sorted(uses(source))
        if not hasattr(getattr(module, owner) if owner else module, name)
    ]


@pytest.mark.parametrize("module", [tensorrt_runner, tensorrt_worker])
def test_every_attribute_that_is_used_of_nvidia_s_classes_exists(module):
    """TensorRT-RTX's bindings share their names with TensorRT's."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install lrq-export[rtx]")
    source = Path(module.__file__).read_text()
    assert len(uses(source)) > 10
    assert absent(rtx, source) == []


def test_an_attribute_that_does_not_exist_is_seen():
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install lrq-export[rtx]")
    source = "context.execute_async_v2(1)\ntrt.DataType.UINT4\nengine.get_tensor_name(0)\ntrt.Parser\n"
    source += "class Times(trt.IProfiler):\n    def report_layer_times(self): ..."
    assert absent(rtx, source) == [
        ".Parser", "DataType.UINT4", "IExecutionContext.execute_async_v2", "IProfiler.report_layer_times"
    ]  # fmt: skip


# ------------------------------------------------------------- a stand-in for TensorRT and CUDA: sample = 2 x + t


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.runs, self.profile = engine, {}, {}, 0, None
        self.profiler = None

    def set_device_memory(self, address, size):
        assert size >= self.engine.device_memory_size_v2

    def set_optimization_profile_async(self, index, stream):
        self.profile = index

    def set_input_shape(self, name, shape):
        assert self.profile is not None
        self.shapes[name] = tuple(shape)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def infer_shapes(self):
        return [name for name in ("x", "t") if name not in self.shapes]

    def get_tensor_shape(self, name):
        return self.shapes["x"]

    def execute_async_v3(self, stream):
        def at(name):
            shape = self.get_tensor_shape(name) if name == "sample" else self.shapes[name]
            size = int(np.prod(shape))
            return np.ctypeslib.as_array((ctypes.c_float * size).from_address(self.addresses[name])).reshape(shape)

        self.runs += 1
        self.engine.events.append(f"run on {stream}")
        assert not self.engine.running, "two calls run at a time"
        self.engine.running = True
        time.sleep(self.engine.seconds)
        self.engine.running = False
        at("sample")[:] = 2 * at("x") + at("t")[:, None]
        if self.profiler is not None:
            self.profiler.report_layer_time("blocks.0", 0.5)
            self.profiler.report_layer_time("blocks.1", 0.25)
        return self.engine.runs_well


class Engine:
    device_memory_size_v2, streamable_weights_size, num_optimization_profiles = 1024, 0, 2
    names, num_io_tensors, runs_well = ("x", "t", "sample"), 3, True

    def __init__(self):
        self.contexts, self.events, self.running, self.seconds = [], [], False, 0.0

    def get_weight_streaming_automatic_budget(self):
        return 77

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return "output" if name == "sample" else "input"

    def get_tensor_dtype(self, name):
        return "float"

    def get_tensor_profile_shape(self, name, index):
        """The first profile is for one sample, the second for 2 to 20; 3 channels."""
        sizes = ((1,), (1,), (1,)) if index == 0 else ((2,), (2,), (20,))
        return [(*size, 3) if name == "x" else size for size in sizes]

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Graph:
    captured = None

    def replay(self):
        Graph.captured.execute_async_v3("own")


class Stream:
    """Of CUDA, by name; what it is told is an event of the engine's."""

    def __init__(self, name, events):
        self.cuda_stream, self._events = name, events

    def wait_stream(self, other):
        self._events.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    def synchronize(self):
        self._events.append(f"{self.cuda_stream} is done")


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """A plan in tmp_path, and a GPU that is this machine's memory."""
    made, runtimes = Engine(), []

    def runtime(logger):
        runtimes.append(SimpleNamespace(deserialize_cuda_engine=lambda plan: made if plan == b"ftrt good" else None))
        return runtimes[-1]

    made.runtimes = runtimes
    own, current = Stream("own", made.events), [Stream("caller", made.events)]
    trt = SimpleNamespace(
        __version__="11.4", Logger=type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None}),
        Runtime=runtime,
        IProfiler=type("IProfiler", (), {}),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        TensorIOMode=SimpleNamespace(INPUT="input"),
        ProfilingVerbosity=SimpleNamespace(LAYER_NAMES_ONLY="names"),
        DataType=SimpleNamespace(FLOAT="float", HALF="half", BF16="bf16", INT32="i", INT64="l", BOOL="b"),
    )  # fmt: skip

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        with on(stream):
            yield
        Graph.captured = made.contexts[-1]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(tensorrt_runner.importlib, "import_module", lambda name: trt)
    fakes = {
        "Stream": lambda device: own, "current_stream": lambda device=None: current[-1], "graph": capture,
        "stream": on, "device": lambda device: contextlib.nullcontext(),
        "CUDAGraph": Graph,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    (tmp_path / "model.plan").write_bytes(b"ftrt good")
    (tmp_path / "build.json").write_text(json.dumps(BUILT))
    return made


def opened(folder, target="tensorrt"):
    return TensorRtRunner(folder, target, torch.device("cpu"))


def given(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(samples, 3, generator=generator), "t": torch.randn(samples, generator=generator)}


def right(runner, inputs):
    return torch.equal(runner(inputs), 2 * inputs["x"] + inputs["t"][:, None])


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_answers_are_the_plan_s_and_sizes_are_made_ready_once(engine, tmp_path, target):
    runner = opened(tmp_path, target)
    first = given(2)
    kept = runner(first)
    assert torch.equal(kept, 2 * first["x"] + first["t"][:, None])
    assert right(runner, given(2, seed=1))
    assert torch.equal(kept, 2 * first["x"] + first["t"][:, None])  # an answer is no view of a buffer
    assert right(runner, given(1))
    assert [context.profile for context in engine.contexts] == [1, 0]
    assert {context.nvtx_verbosity for context in engine.contexts} == {"names"}
    assert all(bucket.graph is None for bucket in runner._buckets.values()) == (target == "tensorrt-rtx")


def test_no_plan_may_run_code_of_its_own(engine, tmp_path):
    """TensorRT's runtimes do not let it unless they are told to."""
    opened(tmp_path)
    (runtime,) = engine.runtimes
    assert vars(runtime).keys() == {"deserialize_cuda_engine"}


def test_buckets_that_were_not_used_for_longest_go(engine, tmp_path):
    runner = opened(tmp_path)
    for samples in range(2, BUCKETS + 3):
        assert right(runner, given(samples))
    assert len(runner._buckets) == BUCKETS
    assert len(engine.contexts) == BUCKETS + 1
    assert right(runner, given(2))
    assert len(engine.contexts) == BUCKETS + 2


def test_a_run_comes_after_what_its_inputs_need_and_before_what_comes_next(engine, tmp_path):
    runner = opened(tmp_path)
    runner(given(2))
    assert engine.events == [
        "own waits for caller", "run on own", "run on own",  # a bucket is made: after its zeros, to allocate, captured
        "own waits for caller", "run on own", "caller waits for own",
    ]  # fmt: skip
    engine.events.clear()
    runner(given(2))
    assert engine.events == ["own waits for caller", "run on own", "caller waits for own"]


def test_a_bucket_goes_when_it_runs_no_more(engine, tmp_path):
    runner = opened(tmp_path)
    for samples in range(2, BUCKETS + 2):
        runner(given(samples))
    assert "own is done" not in engine.events
    engine.events.clear()
    runner(given(BUCKETS + 2))
    assert engine.events[0] == "own is done"


def test_calls_of_threads_take_turns(engine, tmp_path):
    runner = opened(tmp_path, "tensorrt-rtx")
    runner(given(2))
    engine.seconds = 0.02
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda seed: right(runner, given(2, seed)), range(8)))


def test_a_closed_runner_holds_nothing(engine, tmp_path):
    runner = opened(tmp_path)
    runner(given(2))
    runner.close()
    assert engine.events[-1] == "own is done"
    assert not runner._buckets
    assert (runner._engine, runner._runtime, runner._scratch) == (None, None, None)


def test_weights_are_streamed_where_they_can_be(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "streamable_weights_size", 1 << 30)
    opened(tmp_path)
    assert engine.weight_streaming_budget_v2 == 77


def test_layers_are_timed_outside_of_a_graph(engine, tmp_path):
    runner = opened(tmp_path)
    assert right(runner, given(2))
    times = runner.layer_times(given(2), 3)
    assert times == {"blocks.0": [0.5] * 3, "blocks.1": [0.25] * 3}
    assert engine.contexts[0].profiler is None, "a context that answers is not slowed down"
    assert len(runner._buckets) == 1
    with pytest.raises(UsageError, match="no optimization profile"):
        runner.layer_times(given(21), 1)


def test_what_cannot_be_run_is_told(engine, tmp_path, monkeypatch):
    runner = opened(tmp_path)
    with pytest.raises(UsageError, match=r"no optimization profile of the plan takes x \(21, 3\)"):
        runner(given(21))
    monkeypatch.setattr(engine, "runs_well", False)
    with pytest.raises(RuntimeError, match="did not enqueue"):
        runner(given(5))
    (tmp_path / "model.plan").write_bytes(b"ftrt other")
    with pytest.raises(InputError, match=r"tensorrt 11\.4 does not take it; it was built by 10\.16"):
        opened(tmp_path)
    (tmp_path / "build.json").write_text(json.dumps(BUILT | {"plugins": True}))
    monkeypatch.setattr(tensorrt_runner, "find_library", lambda: None)
    with pytest.raises(MissingError, match="plugins build"):
        opened(tmp_path)


def test_a_library_that_cannot_be_imported_is_missing(tmp_path, monkeypatch):
    """So `auto` goes on to the next engine."""

    def fail(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt_runner.importlib, "import_module", fail)
    with pytest.raises(MissingError, match=r"tensorrt: tensorrt cannot be imported: libnvinfer\.so\.10"):
        opened(tmp_path)
