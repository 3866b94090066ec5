"""The report's table of layers and its histograms: what quantization did to each weight and its output."""

from typing import Any

import numpy as np
import torch

from lrq_export.evaluate import evaluate, rotation_of
from lrq_export.quantized import LayerTensors
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.verify import ladder
from lrq_export.verify.subject import Subject

HISTOGRAMS = 6  # layers whose weights are drawn against their levels


def layer_table(subject: Subject) -> list[dict[str, Any]]:
    errors = _output_errors(subject)
    rows = []
    for name, record in subject.quantized.records.items():
        layer = subject.quantized.layer(name)
        rows.append(
            {
                "layer": name, "rows": record.rows, "cols": record.cols, "bits": record.bits,
                "act_bits": record.act_bits, "group_size": record.group_size, "block": record.block,
                "equalized": record.equalizer is not None, "rotated_by": record.rotated_by,
                "reason": record.reason, "weight_nmse": record.weight_nmse,
                "weighted_nmse": record.weighted_nmse, "output_nmse": errors.get(name),
                "bytes": layer.bytes(), "bytes_fp16": 2 * record.rows * record.cols,
            } | subject.reference.statistics[name]
        )  # fmt: skip
    return rows


def _output_errors(subject: Subject) -> dict[str, float]:
    """NMSE of every layer on the floating-point model's activations; needs the source."""
    if subject.source is None:
        return {}
    model = subject.source.load(subject.source.model())

    def replacement(name: str):
        """The quantized layer in the floating-point model's basis: folded rotations are undone on both sides."""
        record = subject.quantized.records[name]
        folded = record.folded_rotation()

        def run(x: torch.Tensor) -> torch.Tensor:
            module = subject.quantized.module(name)  # decoded for each call: all at once would be a second model
            y = module(x if folded is None else folded.apply(x))
            for step in reversed(record.output_steps()):
                y = rotation_of(step, y.shape[-1]).apply_inverse(y)
            return y

        return run

    return ladder.layer_output_errors(subject.family, model, replacement, list(subject.quantized.records), subject.few)


def histograms(subject: Subject) -> list[dict[str, Any]]:
    """A few layers' weights in units of their row scale; where the source is not at hand, the decoded integers."""
    names = list(subject.quantized.records)
    chosen = [names[i] for i in sorted({round(j) for j in np.linspace(0, len(names) - 1, HISTOGRAMS)})]
    return [_histogram(subject, subject.quantized.layer(name)) for name in chosen]


def _histogram(subject: Subject, layer: LayerTensors) -> dict[str, Any]:
    integers = layer.integer_weight().numpy()
    edges = np.linspace(-160, 160, 81)
    values = integers.astype(np.float32) if subject.source is None else _source_integers(subject, layer)
    counts, _ = np.histogram(values.clip(-160, 160), edges)
    return {
        "layer": layer.record.layer,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "levels": _mean_levels(layer),
    }


def _mean_levels(layer: LayerTensors) -> list[float]:
    """The value of every code, averaged over rows and groups; of the 255 levels at 8 bits one in 16 is drawn."""
    table = layer.level_table()
    if table is None:
        return [float(level) for level in range(-112, 113, 16)]
    return sorted(table.double().mean(dim=(0, 1)).tolist())


def _source_integers(subject: Subject, layer: LayerTensors) -> np.ndarray:
    """The floating-point weight in the layer's own basis, in units of its row scales."""
    traced = rewritten_graph(subject.package)
    weight = next(each for each in traced.linears.values() if each.layer == layer.record.layer)
    return (evaluate(weight.weight, subject.source.checkpoint.read) / layer.scale[:, None]).numpy()
