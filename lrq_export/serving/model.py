"""The model behind the server: an engine of a package, its tensors as the protocol names them, and what it takes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lrq_export.engine.built import RTX, TENSORRT
from lrq_export.errors import UsageError
from lrq_export.runtime import ONNXRUNTIME, PackagedTransformer, tensors
from lrq_export.serving.protocol import TensorInfo, invalid
from lrq_export.serving.signature import inputs_of
from lrq_export.serving.triton import KIND_CPU, KIND_GPU

VERSION = "1"
PLATFORMS = {ONNXRUNTIME: "onnxruntime_onnx", TENSORRT: "tensorrt_plan", RTX: "tensorrt-rtx_plan"}  # of the protocol


class ServedModel:
    """Answers arrays with arrays, exactly as the engine does. Several threads may call it at once.

    `outputs` are the engine's. `limits` are the largest sizes of free dimensions by name, e.g. {"samples": 8,
    "height": 128}: what a request may take in memory grows with the square of its tokens.
    """

    def __init__(
        self,
        transformer: PackagedTransformer,
        name: str,
        outputs: Mapping[str, TensorInfo],
        limits: Mapping[str, int] | None = None,
    ):
        self.name, self.specs, self.limits = name, transformer.specs, dict(limits or {})
        self.platform, self._transformer = PLATFORMS[transformer.target], transformer
        self.kind = KIND_GPU if transformer.device.type == "cuda" else KIND_CPU
        self.inputs, self.outputs = inputs_of(self.specs), dict(outputs)
        known = {size for spec in self.specs.values() for size in spec.shape if isinstance(size, str)}
        for dimension in self.limits.keys() - known:
            raise UsageError(f"--limit: got {dimension}, needed one of {', '.join(sorted(known))}")

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name, "versions": [VERSION], "platform": self.platform,
            "inputs": [info.metadata() for info in self.inputs.values()],
            "outputs": [info.metadata() for info in self.outputs.values()],
        }  # fmt: skip

    def check(self, given: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """What the engine is fed. Raises RefusedError or InputError for sizes and values that the model does not take.

        An optional input that is absent is all ones; nothing else is completed or broadcast.
        """
        for name, array in given.items():
            if not np.isfinite(array).all():
                raise invalid(f"{name}: got NaN or Inf, needed finite numbers")
            for dimension, size in zip(self.specs[name].shape, array.shape, strict=True):
                if size > self.limits.get(dimension, size):
                    raise invalid(f"{name}: got {dimension} {size}, needed at most {self.limits[dimension]}")
        arrays = {name: torch.from_numpy(array) for name, array in given.items()}
        fed = tensors(self.specs, arrays, self._transformer.device)
        for name, array in given.items():
            if fed[name].shape != array.shape:
                needed = list(fed[name].shape)
                raise invalid(f"{name}: got shape {list(array.shape)}, needed {needed} as the other inputs have")
            if self.specs[name].shared and (array != array[:1]).any():  # the model takes the first sample's for all
                raise invalid(f"{name}: got values that differ between samples, needed the same for all")
        return fed

    def run(self, fed: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        (name,) = self.outputs
        return {name: self._transformer.run(fed).numpy(force=True)}
