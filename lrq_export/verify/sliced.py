"""Run an ONNX model a slice of its nodes at a time: however large the model, few of its weights are in memory.

ONNX keeps nodes in topological order, so the node list can be cut anywhere: what one slice computes and a later one
reads is handed over as an input. A new slice begins where the weights of the last one reach a limit, so a small model
is one slice, the session that a user would open. The function is the same; fusions across a cut are lost.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from onnx import helper

from lrq_export.errors import InputError
from lrq_export.memory import trim
from lrq_export.onnx_file import read_model
from lrq_export.verify.folded_bodies import fold_bodies

SLICE_BYTES = 48 << 20  # of weights, two elements of 4 bits counted as two bytes
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
ReadInput = Callable[[str], np.ndarray]


@contextmanager
def refusals(where: Path | None) -> Iterator[None]:
    """Make what ONNX Runtime says of a model in a file an InputError; of one without, it is a fault of lrq-export."""
    try:
        yield
    except Exception as error:  # it has a class of its own for each kind of failure
        if where is None or not type(error).__module__.startswith("onnxruntime."):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: ONNX Runtime refuses it: {reason}", hint="build the package again") from error


class SlicedModel:
    """A model whose weights lie in `folder`, or are graph inputs that `weights` makes when they are needed.

    Args:
        model: nodes in topological order and no control flow; its external data is not loaded.
        folder: where its external data is; None if it has none.
        config: session options.
        weights: for graph inputs that are weights, a function that makes each.
        limit: bytes of weights in a slice; one node may exceed it.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        folder: Path | None = None,
        *,
        config: Mapping[str, str] | None = None,
        weights: Mapping[str, Callable[[], np.ndarray]] | None = None,
        limit: int = SLICE_BYTES,
    ):
        self.model, self.weights = model, dict(weights or {})
        self.folder = folder
        self.config = dict(config or {}) | ({} if folder is None else {FOLDER_OPTION: str(folder)})
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.slices = list(cut(model.graph, self._weight_bytes(), limit))

    def run(self, cases: Sequence[ReadInput]) -> Iterator[tuple[int, str, np.ndarray]]:
        """Yield every graph output of every case as soon as it is known: (index of the case, name, array).

        A case is a function that returns the graph input of a name.
        """
        outputs = {value.name for value in self.model.graph.output}
        computed: list[dict[str, np.ndarray]] = [{} for _ in cases]
        for index, nodes in enumerate(self.slices):
            later = {name for rest in self.slices[index + 1 :] for node in rest for name in node.input}
            produced = [name for node in nodes for name in node.output if name in later | outputs]
            read = dict.fromkeys(name for node in nodes for name in node.input if name)
            inside = {name for node in nodes for name in node.output} | self.stored.keys()
            made = {name: self.weights[name]() for name in read if name in self.weights}
            wanted = [name for name in read if name not in inside and name not in made]
            session = None
            for case, (known, given) in enumerate(zip(computed, cases, strict=True)):
                feed = made | {name: known[name] if name in known else given(name) for name in wanted}
                with refusals(self.folder):
                    session = session or self._session(nodes, read, feed, produced)
                    answers = session.run(produced, feed)
                for name, array in zip(produced, answers, strict=True):
                    if name in later:
                        known[name] = array
                    if name in outputs:
                        yield case, name, array
                for name in known.keys() - later:
                    del known[name]
            del session, made, feed, answers
            trim()

    def _weight_bytes(self) -> dict[str, int]:
        sizes = {name: _bytes(tensor.data_type, tensor.dims) for name, tensor in self.stored.items()}
        for value in self.model.graph.input:
            if value.name in self.weights:
                tensor = value.type.tensor_type
                sizes[value.name] = _bytes(tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim])
        return sizes

    def _session(self, nodes: list[onnx.NodeProto], read, feed: Mapping[str, np.ndarray], produced: list[str]):
        """A session of these nodes; the types and ranks of its inputs are those of `feed`."""
        import onnxruntime

        inputs = []
        for name, array in feed.items():
            shape = array.shape if name in self.weights else [None] * array.ndim
            inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
        outputs = [onnx.ValueInfoProto(name=name) for name in produced]  # ONNX Runtime infers their types
        stored = [self.stored[name] for name in read if name in self.stored]
        whole = self.model
        nodes, functions = fold_bodies(nodes, whole.functions)
        graph = helper.make_graph(nodes, "slice", inputs, outputs, stored)
        model = helper.make_model(
            graph, opset_imports=whole.opset_import, ir_version=whole.ir_version, functions=functions
        )
        return onnxruntime.InferenceSession(
            model.SerializeToString(), frugal_options(self.config), providers=["CPUExecutionProvider"]
        )


class SlicedSession:
    """A sliced model that is called as an `onnxruntime.InferenceSession` is, by polygraphy's runner for one."""

    def __init__(self, model: SlicedModel):
        self.model = model
        self._inputs = [
            SimpleNamespace(name=value.name, type="tensor(float)", shape=_sizes(value))
            for value in model.model.graph.input
            if value.name not in model.weights
        ]
        self._outputs = [SimpleNamespace(name=value.name) for value in model.model.graph.output]

    def get_inputs(self) -> list[SimpleNamespace]:
        return self._inputs

    def get_outputs(self) -> list[SimpleNamespace]:
        return self._outputs

    def run(self, _: None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found = {name: array for _, name, array in self.model.run([feed.__getitem__])}
        return [found[value.name] for value in self._outputs]


def sliced_session(path: Path, config: Mapping[str, str] | None = None) -> SlicedSession:
    """A session of the model at `path`, run a slice at a time."""
    return SlicedSession(SlicedModel(read_model(path), path.parent, config=config))


def _sizes(value: onnx.ValueInfoProto) -> list[int | None]:
    """Its shape, None where a size is free."""
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]


def _bytes(onnx_type: int, shape: Sequence[int]) -> int:
    """Bytes of a tensor, two elements of 4 bits counted as two bytes."""
    return helper.tensor_dtype_to_np_dtype(onnx_type).itemsize * math.prod(shape)


def cut(graph: onnx.GraphProto, weight_bytes: Mapping[str, int], limit: int) -> Iterator[list[onnx.NodeProto]]:
    """Yield the nodes of `graph` in runs whose weights take at most `limit` bytes; one node may exceed it."""
    nodes: list[onnx.NodeProto] = []
    inside: set[str] = set()
    for node in graph.node:
        added = {name for name in node.input if name in weight_bytes} - inside
        if inside and added and sum(weight_bytes[name] for name in inside | added) > limit:
            yield nodes
            nodes, inside, added = [], set(), {name for name in node.input if name in weight_bytes}
        nodes.append(node)
        inside |= added
    if nodes:
        yield nodes


def frugal_options(config: Mapping[str, str]):
    """`onnxruntime.SessionOptions` of a session that runs a few times only: memory counts more than speed.

    There is no arena, which grows in powers of two and never shrinks. Of function bodies nothing is folded into
    constants but what depends on attributes alone (`session.disable_quant_qdq` would fold codes): that keeps every
    intermediate of every decode until all are done.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options
