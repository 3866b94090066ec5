"""Write an ONNX file whose weights arrive one at a time; past a limit they stream into external data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from graphs import names
from graphs.ops import attach_bodies
from lrq_export.package import atomic_file

# protobuf ends at 2 GiB; a file that small still copies as one piece, which is what people expect of a small model.
INLINE_LIMIT = 1 << 30
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


def write_model(
    path: Path,
    model: onnx.ModelProto,
    weights: Iterable[WeightTensor],
    *,
    complete: Callable[[onnx.ModelProto], onnx.ModelProto] = attach_bodies,
    inline_limit: int = INLINE_LIMIT,
) -> int:
    """Write `model`, whose weights are graph inputs so far, after `complete` has done to it what its lrq nodes need.

    `path` gets the graph; the weights go inside it, or into `path` + ".data" when they exceed `inline_limit` bytes.
    The data file is complete on disk before the graph that refers to it. Returns the bytes of the weights.
    """
    weights = list(weights)
    model = complete(_without_inputs(model, weights))
    model.ir_version = names.IR_VERSION
    model.producer_name = "lrq-export"
    total = sum(weight.size for weight in weights)
    if total > inline_limit:
        _write_external(path.with_name(path.name + ".data"), model, weights)
    else:
        for weight in weights:
            model.graph.initializer.append(_tensor(weight, raw=weight.read()))
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


def _tensor(weight: WeightTensor, raw: bytes | None = None) -> onnx.TensorProto:
    if raw is None:
        return onnx.TensorProto(name=weight.name, data_type=weight.onnx_type, dims=weight.shape)
    if len(raw) != weight.size:
        raise ValueError(f"{weight.name}: {len(raw)} bytes, announced {weight.size}")
    return onnx.TensorProto(name=weight.name, data_type=weight.onnx_type, dims=weight.shape, raw_data=raw)


def _write_external(path: Path, model: onnx.ModelProto, weights: list[WeightTensor]) -> None:
    with atomic_file(path) as file:
        for weight in weights:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            tensor = _tensor(weight)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", path.name), ("offset", file.tell()), ("length", weight.size)):
                tensor.external_data.add(key=key, value=str(value))
            raw = weight.read()
            if len(raw) != weight.size:
                raise ValueError(f"{weight.name}: {len(raw)} bytes, announced {weight.size}")
            file.write(raw)
            model.graph.initializer.append(tensor)
