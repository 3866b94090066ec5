"""What each layer of a package's engine takes: nodes of ONNX Runtime's optimized graph, layers of a TensorRT plan."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrq_export.engine import onnxruntime
from lrq_export.models import family_of
from lrq_export.package import ONNXRUNTIME_ENGINE, load_manifest
from lrq_export.runtime import ONNXRUNTIME, feeds, open_runner, tensors


@dataclass(frozen=True)
class LayerTime:
    """A layer's median in milliseconds, and its share of the sum of all medians, 0..1."""

    layer: str
    p50_ms: float
    share: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


def layer_times(
    package: Path, target: str, inputs: dict[str, torch.Tensor], runs: int, threads: int | None = None
) -> list[LayerTime]:
    """All layers of a target, the slowest first.

    Their sum is not what a run takes: ONNX Runtime spends time between nodes, TensorRT's profiler lets no two overlap.
    """
    config = load_manifest(package)["source"]["config"]
    specs = family_of(config["_class_name"]).inputs(config)
    if target == ONNXRUNTIME:
        return _slowest_first(
            onnxruntime.layer_times(package / ONNXRUNTIME_ENGINE, feeds(specs, inputs), runs, threads)
        )
    runner = open_runner(package, target, threads)
    try:
        return _slowest_first(runner.layer_times(tensors(specs, inputs, runner.device), runs))
    finally:
        runner.close()


def _slowest_first(times: dict[str, list[float]]) -> list[LayerTime]:
    medians = {layer: float(np.median(each)) for layer, each in times.items()}
    total = sum(medians.values())
    return [
        LayerTime(layer, round(median, 4), round(median / total, 6) if total else 0.0)
        for layer, median in sorted(medians.items(), key=lambda item: -item[1])
    ]
