"""A target of a package as `verify --against` sees it: its model, the weights meant for it, what can run it here."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphs import names
from lrq_export.bind import portable_weights
from lrq_export.engine import tensorrt
from lrq_export.engine.built import FOLDERS as NVIDIA_FOLDERS
from lrq_export.engine.built import PLAN, read_built
from lrq_export.engine.onnxruntime import engine_weights, lower_linears, open_session, session_config
from lrq_export.engine.run_obstacle import machine_obstacle, run_obstacle
from lrq_export.engine.targets import ONNXRUNTIME
from lrq_export.errors import LrqError, MissingError, UsageError
from lrq_export.models.base import InputSpec
from lrq_export.onnx_file import WeightTensor, read_model
from lrq_export.package import ONNXRUNTIME_ENGINE, QUANTIZED
from lrq_export.quantized import QuantizedFile
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.verify.sliced import sliced_session

_HALF = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
FOLDERS = {ONNXRUNTIME: ONNXRUNTIME_ENGINE} | NVIDIA_FOLDERS


class Target:
    """One target of a package.

    Raises UsageError for a name of none, MissingError for one whose model the package does not hold.
    """

    def __init__(self, name: str, package: Path):
        if name not in FOLDERS:
            raise UsageError(f"--against: got {name!r}, needed one of {', '.join(FOLDERS)}")
        self.name, self.package = name, package
        self.path = package / FOLDERS[name] / tensorrt.MODEL
        self.plan = self.path.with_name(PLAN)
        if not self.path.is_file():
            again = f"run lrq-export build {package} --target {name}" if self.is_nvidia else "build the package again"
            raise MissingError(f"{package}: holds no network for {name}", hint=again)

    @property
    def is_nvidia(self) -> bool:
        return self.name != ONNXRUNTIME

    @property
    def where(self) -> str:
        """What of it runs in ONNX Runtime."""
        return "of its network, in ONNX Runtime," if self.is_nvidia else "of the engine"

    @cached_property
    def plugin_nodes(self) -> list[str]:
        """The nodes of its model that plugins run: ONNX Runtime does not know them."""
        if not self.is_nvidia:
            return []
        nodes = read_model(self.path).graph.node
        return [node.name for node in nodes if node.domain == names.DOMAIN]

    @cached_property
    def activations(self) -> str:
        """The type in which its model computes: that of what it keeps in floating point."""
        held = {tensor.data_type for tensor in read_model(self.path).graph.initializer}
        return next((name for name, element in _HALF.items() if element in held), tensorrt.FLOAT32)

    @property
    def runs_in_onnxruntime(self) -> bool:
        """Whether ONNX Runtime has all that its model needs, on the CPU."""
        return not self.plugin_nodes and self.activations != "bfloat16"

    @property
    def config(self) -> dict[str, str]:
        """Session options that its model needs in ONNX Runtime."""
        return session_config(self.path.parent) if self.name == ONNXRUNTIME else {}

    def session(self) -> Any:
        """Its model in ONNX Runtime: of ONNX Runtime's own target the session that users open."""
        return open_session(self.path.parent) if self.name == ONNXRUNTIME else sliced_session(self.path)

    def weights(self) -> Iterator[WeightTensor]:
        """Every weight as it is meant to be in its model."""
        traced, quantized = rewritten_graph(self.package), QuantizedFile(self.package / QUANTIZED)
        if self.name == ONNXRUNTIME:
            return engine_weights(traced, quantized, lower_linears(traced))
        return portable_weights(tensorrt.lower(traced, bool(self.plugin_nodes), self.activations), quantized)

    def obstacle(self) -> LrqError | None:
        """Why NVIDIA's library cannot run it here; None if it can, and for ONNX Runtime's own target.

        InputError for an engine of another version than the library here, else MissingError.
        """
        if not self.is_nvidia:
            return None
        found = machine_obstacle(self.name) or run_obstacle(self.package, self.name)
        if found is None:
            return None
        again = f"lrq-export verify {self.package} --against {self.name}"
        return type(found)(found.message, hint=f"{found.hint}, then run there: {again}")

    def profile_of(self, specs: Mapping[str, InputSpec], feed: Mapping[str, np.ndarray]) -> int | None:
        """The optimization profile of its plan that takes inputs of these sizes; None if none does."""
        sizes = {
            axis: size for name, spec in specs.items() for axis, size in zip(spec.shape, feed[name].shape, strict=True)
        }
        for index, ranges in enumerate(read_built(self.plan.parent).profiles):
            if all(least <= sizes.get(axis, -1) <= most for axis, (least, _, most) in ranges.items()):
                return index
        return None
