"""What a search has evaluated, in one JSON file that is whole after every evaluation.

The file holds values only, no state of a random generator: a search started again repeats its own steps, and reads what
it evaluated before.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any

from lrq_export.errors import InputError, UsageError
from lrq_export.package import TEMPORARY, write_json_atomic

FORMAT = "lrq-export search"
SCHEMA = 1
Genome = tuple[int, ...]  # one group size a layer, in the order of Space.layers


class Evaluations:
    """Values of genomes, each computed once. Without a path they live in memory alone.

    `facts` are what the values and the order of the search depend on, as JSON. Raises InputError for a file that is no
    state of a search, UsageError for one of other facts (naming the first that differs) and for one that cannot be
    written, before anything is evaluated.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.facts = json.loads(json.dumps(facts))  # as it will be read: tuples become lists
        self._values: dict[str, float | None] = {}
        if self.path is not None:
            self._values = self._load(self.path)
            for unfinished in self.path.parent.glob(f".{escape(self.path.name)}.*{TEMPORARY}"):
                unfinished.unlink()  # of a search that was killed while writing
            self._save()

    def value(self, genome: Genome, objective: Callable[[Genome], float]) -> float:
        """objective(genome), from the file when it is there. What is not finite is worth inf, the worst there is."""
        key = " ".join(map(str, genome))
        if key not in self._values:
            value = float(objective(genome))
            self._values[key] = value if math.isfinite(value) else None  # JSON has no inf
            self._save()
        value = self._values[key]
        return math.inf if value is None else value

    def _load(self, path: Path) -> dict[str, float | None]:
        try:
            state = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UsageError(f"{path}: cannot read: {error.strerror}", hint="choose another state file") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON: {error}", hint="choose another state file") from error
        if not isinstance(state, dict) or (state.get("format"), state.get("schema")) != (FORMAT, SCHEMA):
            raise InputError(
                f"{path}: got something else, needed an {FORMAT} of schema {SCHEMA}", hint="choose another state file"
            )
        values = state.get("values")
        if not isinstance(values, dict) or not all(map(_is_value, values.values())):
            raise InputError(f"{path}: values: needed a finite number or null for each genome", hint="remove the file")
        for name, got, needed in _differences(state.get("facts"), self.facts):
            raise UsageError(
                f"{path}: holds another search: {name}: got {json.dumps(got)}, needed {json.dumps(needed)}",
                hint="search with what the file was made with, or choose another state file",
            )
        return values

    def _save(self) -> None:
        if self.path is None:
            return
        state = {"format": FORMAT, "schema": SCHEMA, "facts": self.facts, "values": self._values}
        try:
            write_json_atomic(self.path, state)
        except OSError as error:
            hint = "choose another state file"
            raise UsageError(f"{self.path}: cannot write: {error.strerror}", hint=hint) from error


def _is_value(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _differences(got: Any, needed: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, got and needed of every fact that differs; one that is missing is null."""
    if isinstance(got, dict) and isinstance(needed, dict):
        for key in [*needed, *(got.keys() - needed.keys())]:
            yield from _differences(got.get(key), needed.get(key), f"{name}.{key}" if name else key)
    elif got != needed:
        yield name or "facts", got, needed
