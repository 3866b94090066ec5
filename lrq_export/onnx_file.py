"""ONNX files: read without their external data; written while weights arrive one at a time.

Past a limit they stream into external data.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from graphs import names
from graphs.ops import attach_bodies
from lrq_export.errors import InputError
from lrq_export.package import atomic_file

# protobuf ends at 2 GiB; a file that small still copies as one piece, which is what people expect of a small model.
INLINE_LIMIT = 1 << 30
_AGAIN = "build the package again"
ALIGNMENT = 4096  # bytes; lets a runtime map each tensor by itself


@dataclass(frozen=True)
class WeightTensor:
    """A weight to be written: `read` returns its raw little-endian bytes, called once, just before they are written."""

    name: str
    onnx_type: int  # onnx.TensorProto.DataType
    shape: tuple[int, ...]
    size: int  # bytes
    read: Callable[[], bytes]

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> "WeightTensor":
        onnx_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return cls(name, onnx_type, array.shape, array.nbytes, lambda: np.ascontiguousarray(array).tobytes())

    @classmethod
    def stacked(cls, name: str, parts: "Sequence[WeightTensor]") -> "WeightTensor":
        """The rows of all parts, one below the other; their bytes must be whole."""
        first, rows = parts[0], sum(part.shape[0] for part in parts)
        return cls(
            name, first.onnx_type, (rows, *first.shape[1:]), sum(part.size for part in parts),
            lambda: b"".join(part.read() for part in parts),
        )  # fmt: skip


def read_model(path: Path) -> onnx.ModelProto:
    """The model in a file, without its external data. Raises InputError for a file that is none, or is not there."""
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", hint=_AGAIN) from error
    except DecodeError as error:  # `admit` steps over what it has no use for
        raise InputError(f"{path}: no ONNX model: {error}", hint=_AGAIN) from error


def write_model(
    path: Path,
    model: onnx.ModelProto,
    weights: Iterable[WeightTensor],
    *,
    complete: Callable[[onnx.ModelProto], onnx.ModelProto] = attach_bodies,
    inline_limit: int = INLINE_LIMIT,
    data: Path | None = None,
) -> int:
    """Write `model`, whose weights are graph inputs so far, after `complete` has done to it what its lrq nodes need.

    `path` gets the graph; the weights go inside it, or into `path` + ".data" when they exceed `inline_limit` bytes.
    The data file is complete on disk before the graph that refers to it. `data` is that of another graph in the same
    folder, written of the same weights: `path` refers to it then, and it stays as it is. Returns the bytes of the
    weights.
    """
    weights = list(weights)
    model = complete(_without_inputs(model, weights))
    model.ir_version = names.IR_VERSION
    model.producer_name = "lrq-export"
    total = sum(weight.size for weight in weights)
    if total > inline_limit:
        if data is None:
            data = _write_data(data_file(path), weights)
        model.graph.initializer.extend(_external(data.name, weights))
    else:
        for weight in weights:
            model.graph.initializer.append(_tensor(weight, raw_data=_read(weight)))
    with atomic_file(path) as file:
        file.write(model.SerializeToString(deterministic=True))
    return total


def _without_inputs(model: onnx.ModelProto, weights: Sequence[WeightTensor]) -> onnx.ModelProto:
    inputs = {value.name: value for value in model.graph.input}
    shapes = {weight.name: weight.shape for weight in weights}
    kept = [value for name, value in inputs.items() if name not in shapes]
    missing = shapes.keys() - inputs.keys()
    if missing:
        raise ValueError(f"the graph has no input for the weights {sorted(missing)[:3]}")
    for name, shape in shapes.items():  # codes in another layout than their node reads would be other codes
        declared = tuple(dim.dim_value for dim in inputs[name].type.tensor_type.shape.dim)
        if declared != tuple(shape):
            raise ValueError(f"{name}: the graph's input has shape {declared}, its weight {tuple(shape)}")
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.input[:], bare.metadata_props[:]
    bare.graph.input.extend(kept)
    return bare


def data_file(path: Path) -> Path:
    """Where the weights of a graph lie that are not inside it."""
    return path.with_name(path.name + ".data")


def _tensor(weight: WeightTensor, **content) -> onnx.TensorProto:
    return onnx.TensorProto(name=weight.name, data_type=weight.onnx_type, dims=weight.shape, **content)


def _external(location: str, weights: list[WeightTensor]) -> Iterator[onnx.TensorProto]:
    """The tensors of a file of weights, by their places in it."""
    for weight, start in zip(weights, _starts(weights), strict=True):
        tensor = _tensor(weight)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", start), ("length", weight.size)):
            tensor.external_data.add(key=key, value=str(value))
        yield tensor


def _starts(weights: list[WeightTensor]) -> Iterator[int]:
    """Where each weight begins in a file of them all."""
    stop = 0
    for weight in weights:
        start = stop + -stop % ALIGNMENT
        yield start
        stop = start + weight.size


def _write_data(path: Path, weights: list[WeightTensor]) -> Path:
    with atomic_file(path) as file:
        for weight, start in zip(weights, _starts(weights), strict=True):
            file.write(b"\0" * (start - file.tell()))
            file.write(_read(weight))
    return path


def _read(weight: WeightTensor) -> bytes:
    raw = weight.read()
    if len(raw) != weight.size:
        raise ValueError(f"{weight.name}: {len(raw)} bytes, announced {weight.size}")
    return raw
