"""The graphs of a package before its weights were bound: after trace and after each pass, each one small ONNX file."""

import json
from pathlib import Path
from typing import Any

import onnx

from graphs.traced import TracedGraph
from lrq_export.package import GRAPHS, write_bytes_atomic

TRACE = f"{GRAPHS}/0-trace.onnx"
OUTCOME_KEY = "lrq.pass"  # metadata of a pass's graph: its name, fire count and near misses


def pass_file(folder: Path, index: int, name: str) -> Path:
    return folder / GRAPHS / f"{index + 1}-{name}.onnx"


def load_graph(path: Path) -> TracedGraph:
    return TracedGraph.from_onnx(onnx.load(path))


def pass_files(folder: Path) -> list[Path]:
    """The graphs after each pass, in the order of the pipeline that made this package, which may not be today's."""
    files = [path for path in (folder / GRAPHS).glob("*-*.onnx") if path != folder / TRACE]
    return sorted(files, key=lambda path: int(path.name.partition("-")[0]))


def rewritten_graph(folder: Path) -> TracedGraph:
    """The graph after the last pass."""
    return load_graph(pass_files(folder)[-1])


def save_graph(path: Path, traced: TracedGraph, outcome: dict[str, Any] | None = None) -> None:
    """Write a graph, and with it what the pass that made it reported."""
    model = traced.to_onnx()
    if outcome is not None:
        model.metadata_props.add(key=OUTCOME_KEY, value=json.dumps(outcome, sort_keys=True))
    write_bytes_atomic(path, model.SerializeToString(deterministic=True))


def saved_graphs(package: Path) -> tuple[list[TracedGraph], list[dict[str, Any]]]:
    """The graph after trace and after each pass, and what became of each pass."""
    stages, outcomes = [load_graph(package / TRACE)], []
    for path in pass_files(package):
        model = onnx.load(path)
        stages.append(TracedGraph.from_onnx(model))
        properties = {entry.key: entry.value for entry in model.metadata_props}
        outcomes.append(json.loads(properties[OUTCOME_KEY]))
    return stages, outcomes


def left_out(outcomes: list[dict[str, Any]]) -> list[str]:
    """A line for every pass that --keep-going left out."""
    return [f"rewrite: pass {row['name']} was left out: {row['refused']}" for row in outcomes if row["refused"]]
