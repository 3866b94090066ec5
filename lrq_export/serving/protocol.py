"""The Open Inference Protocol v2 on the wire: requests and answers as JSON, or as JSON with binary tensors behind it.

A body with binary tensors is one JSON object, then the bytes of those tensors in the order the object names them,
row-major and little-endian. The header `Inference-Header-Content-Length` says where the object ends.

Everything here comes from strangers: sizes are checked against the bytes that came before anything is allocated.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_ID = 1024  # characters
JSON_LENGTH = "Inference-Header-Content-Length"
# A JSON number is a Python object while it is read: some 20 times its bytes. Larger tensors belong behind the JSON.
JSON_LIMIT = 8 << 20  # bytes
LARGEST_SIZE = 2**31 - 1  # of a dimension
SHOWN = 60  # characters of a wrong value that an error repeats

DATATYPES: Mapping[str, np.dtype] = {
    name: np.dtype(code).newbyteorder("<")
    for name, code in {
        "BOOL": "?", "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8", "UINT8": "u1", "UINT16": "u2",
        "UINT32": "u4", "UINT64": "u8", "FP16": "f2", "FP32": "f4", "FP64": "f8",
    }.items()
}  # fmt: skip
KINDS_FOR = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}  # what JSON may hold for each kind of tensor


class RefusedError(Exception):
    """A request that gets no tensors. `reason` names its kind, as metrics count it."""

    def __init__(self, status: int, reason: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.reason, self.headers = status, reason, dict(headers or {})


def invalid(message: str) -> RefusedError:
    """What a request is refused with that does not fit the protocol or the model."""
    return RefusedError(400, "invalid", message)


@dataclass(frozen=True)
class TensorInfo:
    """An input or output as the protocol describes it; -1 is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return DATATYPES[self.datatype]

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for, as bytes or as JSON numbers."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """A request that is whole: known names, right types, as many bytes as its shapes say."""

    id: str | None
    arrays: dict[str, np.ndarray]
    outputs: tuple[Wanted, ...]


def parse_request(
    body: bytes | bytearray, json_length: str | None, inputs: Mapping[str, TensorInfo], outputs: Iterable[str]
) -> InferRequest:
    """Read an infer request. Raises RefusedError with one line for whatever is wrong with it."""
    size = _json_size(json_length, len(body))
    message = _json_object(bytes(body[:size]))
    if not isinstance(message.get("id", ""), str):
        raise invalid(f"id: got {_shown(message['id'])}, needed a string")
    if len(message.get("id", "")) > MOST_ID:  # an answer repeats it
        raise invalid(f"id: got {len(message['id'])} characters, needed at most {MOST_ID}")
    arrays = _tensors(message, memoryview(body)[size:], inputs)
    return InferRequest(message.get("id"), arrays, _wanted(message, tuple(outputs)))


def render_answer(
    model: str, version: str, request: InferRequest, arrays: Mapping[str, np.ndarray], infos: Mapping[str, TensorInfo]
) -> tuple[dict[str, str], bytes]:
    """Headers and body that answer a request. Raises RefusedError for NaN or Inf that would have to be JSON."""
    answer: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id is not None:
        answer["id"] = request.id
    answer["outputs"], blobs = [], []
    for wanted in request.outputs:
        info, array = infos[wanted.name], arrays[wanted.name]
        entry: dict[str, Any] = {"name": info.name, "datatype": info.datatype, "shape": list(array.shape)}
        if wanted.binary:
            blobs.append(array.astype(info.dtype, copy=False).tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            if not np.isfinite(array).all():
                raise RefusedError(500, "failed", f"{info.name}: got NaN or Inf, which JSON cannot hold")
            entry["data"] = array.reshape(-1).tolist()
        answer["outputs"].append(entry)
    text = json.dumps(answer, separators=(",", ":")).encode()
    if not blobs:
        return {"Content-Type": "application/json"}, text
    return {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(text))}, b"".join([text, *blobs])


def _json_size(header: str | None, length: int) -> int:
    """How many bytes of the body are JSON."""
    if header is not None and not re.fullmatch(r"[0-9]{1,18}", header):
        raise invalid(f"{JSON_LENGTH}: got {_shown(header)}, needed a number of bytes")
    size = length if header is None else int(header)
    if size > length:
        raise invalid(f"{JSON_LENGTH}: got {size}, needed at most the {length} bytes of the body")
    if size > JSON_LIMIT:
        message = f"body: got {size} bytes of JSON, needed at most {JSON_LIMIT}: send tensors as binary data"
        raise RefusedError(413, "too large", message)
    return size


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        message = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(f"body: needed JSON: {_one_line(error)}") from None
    if not isinstance(message, dict):
        raise invalid("body: needed a JSON object")
    return message


def _no_constant(name: str) -> float:
    raise ValueError(f"got {name}, which is no JSON number")


def _tensors(message: Mapping[str, Any], blob: memoryview, inputs: Mapping[str, TensorInfo]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    position = 0
    for entry in _entries(message, "inputs"):
        name = _known(entry, "inputs", inputs, arrays)
        info = inputs[name]
        if entry.get("datatype") != info.datatype:
            raise invalid(f"{name}: got datatype {_shown(entry.get('datatype'))}, needed {info.datatype}")
        shape = _shape(name, entry.get("shape"), info)
        size = _parameters(entry, name).get("binary_data_size")
        if size is None:
            arrays[name] = _from_json(name, entry.get("data"), shape, info.dtype)
            continue
        needed = math.prod(shape) * info.dtype.itemsize
        if type(size) is not int or size != needed:
            raise invalid(f"{name}: got binary_data_size {_shown(size)}, needed {needed} for shape {list(shape)}")
        if "data" in entry:
            raise invalid(f"{name}: got both data and binary_data_size, needed one of them")
        if size > len(blob) - position:
            raise invalid(f"{name}: got {len(blob) - position} bytes behind the JSON, needed {size}")
        # A copy: the bytes may start anywhere, and arrays shall be aligned.
        arrays[name] = np.array(np.frombuffer(blob[position : position + size], info.dtype).reshape(shape))
        position += size
    if position != len(blob):
        raise invalid(f"body: got {len(blob)} bytes behind the JSON, needed {position}")
    return arrays


def _wanted(message: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Wanted, ...]:
    """The outputs asked for; all of them when none is named."""
    binary = _flag(_parameters(message, "request"), "binary_data_output", False)
    if not message.get("outputs"):
        return tuple(Wanted(name, binary) for name in names)
    wanted: dict[str, Wanted] = {}
    for entry in _entries(message, "outputs"):
        name = _known(entry, "outputs", names, wanted)
        parameters = _parameters(entry, name)
        if "classification" in parameters:
            raise invalid(f"{name}: classification is not offered")
        wanted[name] = Wanted(name, _flag(parameters, "binary_data", binary))
    return tuple(wanted.values())


def _entries(message: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = message.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise invalid(f"{key}: got {_shown(entries)}, needed a list of objects")
    return entries


def _known(entry: Mapping[str, Any], key: str, names: Iterable[str], before: Mapping[str, Any]) -> str:
    """The name of an input or output that the model has and the request has not named before."""
    name = entry.get("name")
    if not isinstance(name, str) or name not in names:
        raise invalid(f"{key}: got {_shown(name)}, needed one of {', '.join(names)}")
    if name in before:
        raise invalid(f"{key}: got {name} twice, needed it once")
    return name


def _parameters(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise invalid(f"{where}: parameters: got {_shown(parameters)}, needed an object")
    if "shared_memory_region" in parameters:
        raise invalid(f"{where}: shared memory is not offered: send the tensor")
    return parameters


def _flag(parameters: Mapping[str, Any], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise invalid(f"{key}: got {_shown(value)}, needed true or false")
    return value


def _shape(name: str, shape: Any, info: TensorInfo) -> tuple[int, ...]:
    """A shape of the model's rank, every size positive; which sizes go together is the model's to judge."""
    needed = list(info.shape)
    if not isinstance(shape, list) or len(shape) != len(needed):
        raise invalid(f"{name}: got shape {_shown(shape)}, needed {needed} (-1: any size)")
    for size, fixed in zip(shape, needed, strict=True):
        if type(size) is not int or not 1 <= size <= LARGEST_SIZE or fixed not in (-1, size):
            raise invalid(f"{name}: got shape {_shown(shape)}, needed {needed} (-1: any size)")
    return tuple(shape)


def _from_json(name: str, data: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Numbers, flat or nested, as an array; those that do not fit the type are refused, not wrapped."""
    needed = f"needed the {math.prod(shape)} numbers of shape {list(shape)}, flat or nested"
    if not isinstance(data, list):
        raise invalid(f"{name}: data: got {_shown(data)}, {needed}")
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError):
        raise invalid(f"{name}: data: got lists of unequal length or depth, {needed}") from None
    if values.dtype.kind not in KINDS_FOR[dtype.kind] or values.size != math.prod(shape):
        raise invalid(f"{name}: data: got {values.size} values of {values.dtype.kind!r} kind, {needed}")
    if values.ndim > 1 and values.shape != shape:
        raise invalid(f"{name}: data: got lists of shape {list(values.shape)}, {needed}")
    with np.errstate(over="ignore"):
        array = values.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(array, values):
        raise invalid(f"{name}: data: got numbers that {dtype.name} cannot hold")
    return array.reshape(shape)


def _shown(value: Any) -> str:
    """A wrong value as an error repeats it: short, and on one line."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[: 2 * SHOWN]
