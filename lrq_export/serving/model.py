"""The model behind the server: a package's session, its tensors as the protocol names them, and what it takes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lrq_export.errors import UsageError
from lrq_export.runtime import PackagedTransformer, feeds
from lrq_export.serving.protocol import TensorInfo, invalid

VERSION = "1"
# What ONNX Runtime calls a type, and the protocol.
ONNX_DATATYPES = {
    "bool": "BOOL", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "uint8": "UINT8",
    "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "float16": "FP16", "float": "FP32", "double": "FP64",
}  # fmt: skip


class ServedModel:
    """Answers arrays with arrays, exactly as the session does. Several threads may call it at once.

    `limits` are the largest sizes of free dimensions by name, e.g. {"samples": 8, "height": 128}: what a request may
    take in memory grows with the square of its tokens.
    """

    def __init__(self, runner: PackagedTransformer, name: str, limits: Mapping[str, int] | None = None):
        self.name, self.specs, self.limits = name, runner.specs, dict(limits or {})
        self._session = runner.session
        self.inputs = {each.name: tensor_info(each) for each in runner.session.get_inputs()}
        self.outputs = {each.name: tensor_info(each) for each in runner.session.get_outputs()}
        known = {size for spec in self.specs.values() for size in spec.shape if isinstance(size, str)}
        for dimension in self.limits.keys() - known:
            raise UsageError(f"--limit: got {dimension}, needed one of {', '.join(sorted(known))}")

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name, "versions": [VERSION], "platform": "onnxruntime_onnx",
            "inputs": [info.metadata() for info in self.inputs.values()],
            "outputs": [info.metadata() for info in self.outputs.values()],
        }  # fmt: skip

    def check(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the session is fed. Raises RefusedError or InputError for sizes and values that the model does not take.

        An optional input that is absent is all ones; nothing else is completed or broadcast.
        """
        for name, array in given.items():
            if not np.isfinite(array).all():
                raise invalid(f"{name}: got NaN or Inf, needed finite numbers")
            for dimension, size in zip(self.specs[name].shape, array.shape, strict=True):
                if size > self.limits.get(dimension, size):
                    raise invalid(f"{name}: got {dimension} {size}, needed at most {self.limits[dimension]}")
        fed = feeds(self.specs, {name: torch.from_numpy(array) for name, array in given.items()})
        for name, array in given.items():
            if fed[name].shape != array.shape:
                needed = list(fed[name].shape)
                raise invalid(f"{name}: got shape {list(array.shape)}, needed {needed} as the other inputs have")
        return fed

    def run(self, fed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self._session.run(list(self.outputs), fed), strict=True))


def tensor_info(value: Any) -> TensorInfo:
    """An input or output of a session, whose free dimensions have names or none."""
    datatype = ONNX_DATATYPES[value.type.removeprefix("tensor(").removesuffix(")")]
    return TensorInfo(value.name, datatype, tuple(size if isinstance(size, int) else -1 for size in value.shape))
