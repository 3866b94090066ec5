"""The graphs of a package before its weights were bound: after trace and after each pass, each one small ONNX file."""

import json
import re
from pathlib import Path
from typing import Any

import onnx
from pydantic import BaseModel

from graphs.checks import check
from graphs.traced import TracedGraph
from lrq_export.errors import InputError
from lrq_export.onnx_file import read_model
from lrq_export.package import GRAPHS, write_bytes_atomic


class NearMiss(BaseModel):
    """A node that a pass looked at and left."""

    node: str
    reason: str


class PassRow(BaseModel):
    """What a pass reported (`rewrite.Outcome`)."""

    name: str
    fired: int
    skipped: list[NearMiss]
    nmse: float | None
    refused: str | None


TRACE = f"{GRAPHS}/0-trace.onnx"
OUTCOME_KEY = "lrq.pass"  # metadata of a pass's graph: its name, fire count and near misses
_PLACE = re.compile("([0-9]+)-")  # how the name of a pass's graph begins
_AGAIN = "build the package again"


def pass_file(folder: Path, index: int, name: str) -> Path:
    return folder / GRAPHS / f"{index + 1}-{name}.onnx"


def load_graph(path: Path) -> TracedGraph:
    """Raises InputError for a file that is not there, or is no such graph."""
    return _traced(path, read_model(path))


def pass_files(folder: Path) -> list[Path]:
    """The graphs after each pass, in the order of the pipeline that made this package, which may not be today's."""
    places = {path: _PLACE.match(path.name) for path in (folder / GRAPHS).glob("*.onnx") if path != folder / TRACE}
    return sorted((path for path, place in places.items() if place), key=lambda path: int(places[path][1]))


def rewritten_graph(folder: Path) -> TracedGraph:
    """The graph after the last pass. Raises InputError for a folder that holds none."""
    files = pass_files(folder)
    if not files:
        raise _no_pass(folder)
    return load_graph(files[-1])


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
        model = read_model(path)
        stages.append(_traced(path, model))
        properties = {entry.key: entry.value for entry in model.metadata_props}
        try:
            outcomes.append(PassRow.model_validate_json(properties[OUTCOME_KEY]).model_dump())
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: says not what its pass did: {error!r}", hint=_AGAIN) from error
    if not outcomes:
        raise _no_pass(package)
    return stages, outcomes


def left_out(outcomes: list[dict[str, Any]]) -> list[str]:
    """A line for every pass that --keep-going left out."""
    return [f"rewrite: pass {row['name']} was left out: {row['refused']}" for row in outcomes if row["refused"]]


def _no_pass(folder: Path) -> InputError:
    return InputError(f"{folder / GRAPHS}: holds the graph of no pass", hint=_AGAIN)


def _traced(path: Path, model: onnx.ModelProto) -> TracedGraph:
    """The graph of a file that may come from anyone, held to the rules that each pass was held to."""
    try:
        traced = TracedGraph.from_onnx(model)
        check(traced)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # of tables and nodes of any kind
        raise InputError(f"{path}: no graph of a build: {error!r}", hint=_AGAIN) from error
    return traced
