"""Describe a package: what `lrq-export inspect` prints."""

import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.printer

from graphs.passes import TARGETS, target_passes
from graphs.traced import TracedGraph
from lrq_export.admit import admit
from lrq_export.errors import UsageError, printable
from lrq_export.onnx_file import read_model
from lrq_export.package import MODEL, QUANTIZED
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Recipe, nearest
from lrq_export.saved_graphs import saved_graphs

LINE = 120  # columns of a line that lists nodes


@dataclass(frozen=True)
class Section:
    """Data for machines, and the lines a person reads."""

    data: dict[str, Any]
    lines: list[str]

    def text(self) -> str:
        """On a terminal nothing but text, whatever the package holds."""
        return printable("\n".join(self.lines), kept="\n")


def describe(package: Path) -> Section:
    """The package at a glance: source, recipe, ops of model.onnx, sizes."""
    manifest = admit(package)
    model = read_model(package / MODEL)
    ops = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    inputs = {value.name: _shape(value) for value in model.graph.input}
    outputs = {value.name: _shape(value) for value in model.graph.output}
    data = {
        "class": manifest["source"]["config"]["_class_name"],
        "weights": manifest["recipe"]["weights"],
        "activations": manifest["recipe"]["activations"],
        "inputs": inputs,
        "outputs": outputs,
        "ops": dict(ops.most_common()),
        "bodies": [f"{function.domain}.{function.name}" for function in model.functions],
        "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
    }
    lines = [
        f"{data['class']}, {manifest['recipe']['weights']['bits']}-bit weights, "
        f"{manifest['recipe']['activations']['bits']}-bit activations, {len(manifest['layers'])} quantized layers",
        *(f"input  {name} {shape}" for name, shape in inputs.items()),
        *(f"output {name} {shape}" for name, shape in outputs.items()),
        "nodes  " + ", ".join(f"{count} {op}" for op, count in ops.most_common()),
        "bodies " + ", ".join(data["bodies"]),
        *(f"{size:>12,} bytes  {name}" for name, size in data["files"].items()),
    ]
    return Section(data, lines)


def describe_passes(package: Path) -> Section:
    """How often each rewrite fired and, for every near miss, which nodes and why; then the passes of targets."""
    manifest = admit(package)
    stages, passes = saved_graphs(package)
    lines = []
    for row in passes:
        proved = "" if row["nmse"] is None else f", answers moved by NMSE {row['nmse']:.1e}"
        lines.append(f"{row['name']}: fired {row['fired']} times, {len(row['skipped'])} near misses{proved}")
        lines += [f"    left out: {row['refused']}"] * (row["refused"] is not None)
        lines += _near_misses(row["skipped"])
    targets = [after.row for after in _target_passes(stages[-1], _activations(manifest))]
    for row in targets:
        lines.append(f"{row['name']}, for {' and '.join(row['targets'])} alone: fired {row['fired']} times")
        lines += _near_misses(row["skipped"])
    return Section({"passes": passes, "target_passes": targets}, lines)


def _near_misses(skipped: list[dict[str, str]]) -> list[str]:
    """Each reason once, with the nodes below it: a deep model has the same one in every block."""
    nodes: dict[str, list[str]] = {}
    for skip in skipped:
        nodes.setdefault(skip["reason"], []).append(skip["node"])
    indent = {"initial_indent": " " * 8, "subsequent_indent": " " * 8, "break_long_words": False}
    return [
        line
        for reason, names in nodes.items()
        for line in (f"    {reason}:", *textwrap.wrap(", ".join(names), LINE, break_on_hyphens=False, **indent))
    ]


@dataclass(frozen=True)
class _TargetPass:
    """A pass that targets run after the pipeline, on a copy: what it did, and the graph after it."""

    row: dict[str, Any]
    graph: TracedGraph


def _activations(manifest: dict[str, Any]) -> str:
    """The type in which the engines of a package compute, by its recipe."""
    return Recipe.model_validate(manifest["recipe"]).engine.activations


def _target_passes(rewritten: TracedGraph, activations: str) -> list[_TargetPass]:
    """Every pass of a target once; they run now, since a package holds the graph of the pipeline for all targets."""
    found: dict[str, _TargetPass] = {}
    for target in TARGETS:
        graph = rewritten.copy()
        for step in target_passes(target, activations):
            graph, name = graph.copy(), step.__name__
            result = step(graph)
            row = {"name": name, "targets": [], "fired": result.fired, "skipped": list(map(asdict, result.skipped))}
            found.setdefault(name, _TargetPass(row, graph)).row["targets"].append(target)
    return list(found.values())


def graph_text(package: Path, stage: str) -> str:
    """The graph after `trace`, a pass that made the package or one of a target, as ONNX text.

    Raises UsageError for another name.
    """
    manifest = admit(package)  # says what is wrong with anything that is no package
    stages, outcomes = saved_graphs(package)
    names = ["trace", *(row["name"] for row in outcomes)]
    for each in _target_passes(stages[-1], _activations(manifest)):
        names.append(each.row["name"])
        stages.append(each.graph)
    if stage not in names:
        near = nearest(stage, names)
        raise UsageError(
            f"--dump-after: got {stage!r}, needed one of {', '.join(names)}",
            hint=f"did you mean {near}?" if near else None,
        )
    return onnx.printer.to_text(stages[names.index(stage)].to_onnx())


def describe_layers(package: Path) -> Section:
    """One line a quantized layer: size, bits, how its input is rotated and why, its weight error."""
    admit(package)
    records = QuantizedFile(package / QUANTIZED).records
    width = max(len(name) for name in records)
    lines = [
        f"{name:<{width}}  {record.rows:>5} x {record.cols:<5} w{record.bits}a{record.act_bits}  "
        f"weight NMSE {record.weight_nmse:.2e}  {record.rotated_by}: {record.reason}"
        for name, record in records.items()
    ]
    return Section({"layers": {name: vars(record) for name, record in records.items()}}, lines)


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
