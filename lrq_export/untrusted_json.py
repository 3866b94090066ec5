"""JSON from a file that someone else may have written, parsed within bounds of memory and in one meaning only."""

import json
from pathlib import Path
from typing import Any

from lrq_export.errors import InputError

# The largest package lists some thousand layers: 50,000 values in 2 MB. What is read at most takes some 100 MB.
MOST_BYTES = 16_000_000
MOST_VALUES = 300_000
_BEFORE_VALUES = (b",", b":", b"[", b"{")  # each value comes after one of these; strings may hold more of them


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises InputError for anything else."""
    return json_object(read_bounded(path), str(path))


def read_bounded(path: Path) -> bytes:
    """A whole file of text. Raises InputError for one that cannot be read or exceeds MOST_BYTES."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe waits for whoever writes to it
            raise InputError(
                f"{path}: cannot be read: got a folder or a device, needed a plain file", hint="check the file"
            )
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise InputError(
                    f"{path}: got {path.stat().st_size} bytes, needed at most {MOST_BYTES}", hint="check the file"
                )
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", hint="check the file") from error
    return data


def json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object, refusing repeated keys: two readers could see two different files."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {key[:80]!r} appears twice")
            result[key] = value
        return result

    values = sum(text.count(mark) for mark in _BEFORE_VALUES)
    if values > MOST_VALUES:
        raise InputError(f"{where}: got up to {values} values, needed at most {MOST_VALUES}", hint="check the file")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{where}: not valid JSON: {message}", hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: got a JSON {type(value).__name__}, needed an object", hint="fetch the file again")
    return value
