"""Tensors of a network or a plan in NVIDIA's library, which runs in a process of its own (tensorrt_worker).

Not yet run: it needs a GPU. Building, and all that polygraphy and the process are told, is tested with TensorRT-RTX.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx

from lrq_export.engine import tensorrt
from lrq_export.engine.built import RTX
from lrq_export.engine.run_obstacle import MODULES
from lrq_export.engine.tensorrt_worker import RTX_VARIABLE
from lrq_export.errors import CheckFailed, MissingError
from lrq_export.package import write_bytes_atomic
from lrq_export.plugins import LIBRARY, find_library
from lrq_export.verify.bisect import OnnxTensors
from lrq_export.verify.sliced import ReadInput
from lrq_export.verify.step import sized_inputs
from lrq_export.verify.target import Target

NETWORK = "network.py"
_SCRIPT = """\
import importlib

from polygraphy.backend.trt import network_from_onnx_path

if importlib.import_module({module}).get_plugin_registry().load_library({library}) is None:
    raise SystemExit("the plugins were not loaded: " + {library})


def load_network():
    return network_from_onnx_path({model}, strongly_typed=True)
"""
Feed = Mapping[str, np.ndarray]


class TensorRtTensors(OnnxTensors):
    """As `OnnxTensors`, in NVIDIA's library: each call builds an engine with the named tensors as its outputs."""

    def __init__(self, path: Path, inputs: Feed, target: Target):
        super().__init__(path, inputs)
        self.target = target

    def replay_words(self, tensor: str, folder: Path) -> list[str]:
        library, network = plugins_of(self.target), self.path
        if library is not None:  # polygraphy's --plugins takes only libraries that register what they hold themselves
            network = folder / NETWORK
            parts = {"module": MODULES[self.target.name], "library": str(library), "model": str(self.path)}
            write_bytes_atomic(network, _SCRIPT.format(**{name: repr(part) for name, part in parts.items()}).encode())
        settings = []
        if self.target.name == RTX:
            found = [str(tensorrt.unversioned_library(folder)), os.environ.get("LD_LIBRARY_PATH", "")]
            settings = [f"{RTX_VARIABLE}=1", f"LD_LIBRARY_PATH={':'.join(filter(None, found))}"]
        return [*settings, "polygraphy", "run", str(network), "--trt", "--strongly-typed", "--trt-outputs", tensor]

    def __call__(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        (answers,) = run(self.target, [self.inputs], model=self.path, outputs=names)
        return answers


def run_cut(target: Target, cut: onnx.ModelProto, cases: Sequence[ReadInput]) -> Iterator[tuple[int, str, np.ndarray]]:
    """What `SlicedModel.run` yields, of a cut network (`forced`) in one engine that is built for the cases' sizes."""
    computed = {name for node in cut.graph.node for name in node.output}
    outputs = [value.name for value in cut.graph.output if value.name in computed]
    feeds = [{value.name: read(value.name) for value in cut.graph.input} for read in cases]
    with tempfile.TemporaryDirectory(dir=target.package.parent) as folder:  # so that the data can be linked
        path = Path(folder) / target.path.name
        del cut.graph.input[:]
        cut.graph.input.extend(sized_inputs(feeds))
        path.write_bytes(cut.SerializeToString())
        data = target.path.with_name(f"{target.path.name}.data")
        if data.exists():
            os.link(data, path.with_name(data.name))
        answers = run(target, feeds, model=path, outputs=outputs)
    for case, found in enumerate(answers):
        for name, array in found.items():
            yield case, name, array


class PlanSession:
    """The package's plan, called as an `onnxruntime.InferenceSession` is, by polygraphy's runner for one.

    All cases run at once in the process of the library, each under its optimization profile; then `run` tells them.
    """

    def __init__(self, target: Target, cases: Sequence[Feed], profiles: Sequence[int]):
        self._shapes = {name: list(array.shape) for name, array in cases[0].items()}
        self._answers = run(target, cases, engine=target.plan, profiles=profiles)
        self._next = iter(self._answers)

    def get_inputs(self) -> list[SimpleNamespace]:
        free = {name: [None] * len(shape) for name, shape in self._shapes.items()}
        return [SimpleNamespace(name=name, type="tensor(float)", shape=shape) for name, shape in free.items()]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self._answers[0]]

    def run(self, _: None, feed: Feed) -> list[np.ndarray]:
        return list(next(self._next).values())


def run(
    target: Target,
    cases: Sequence[Feed],
    *,
    model: Path | None = None,
    outputs: Sequence[str] = (),
    engine: Path | None = None,
    profiles: Sequence[int] | None = None,
) -> list[dict[str, np.ndarray]]:
    """By name, what an engine answers to each case: the file `engine`, or one of `model` with these outputs.

    Raises CheckFailed if NVIDIA's library refuses, MissingError if the plugins that the network wants are not here.
    """
    library = plugins_of(target)
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "do": "infer", "target": target.name, "plugins": None if library is None else str(library),
            "model": None if model is None else str(model), "outputs": list(outputs),
            "engine": None if engine is None else str(engine), "cases": [],
        }  # fmt: skip
        for index, case in enumerate(cases):
            files = {"feed": f"{folder}/{index}.feed.npz", "answers": f"{folder}/{index}.answers.npz"}
            np.savez(files["feed"], *case.values())
            shapes = {name: list(array.shape) for name, array in case.items()}
            job["cases"].append(files | {"shapes": shapes, "profile": index if profiles is None else profiles[index]})
        answer = tensorrt.run_worker(job)
        if "error" in answer:
            raise CheckFailed(f"{target.name}: {answer['error']}", hint="report this fault of lrq-export")
        return [_answers(case["answers"], answer["outputs"]) for case in job["cases"]]


def plugins_of(target: Target) -> Path | None:
    """The library that runs the target's lrq nodes; None if it has none. Raises MissingError if it is not compiled."""
    if not target.plugin_nodes:
        return None
    library = find_library()
    if library is None:
        raise MissingError(f"{target.name}: {LIBRARY} is not compiled", hint="run lrq-export plugins build")
    return library


def _answers(file: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(zip(names, (arrays[f"arr_{index}"] for index in range(len(names))), strict=True))
