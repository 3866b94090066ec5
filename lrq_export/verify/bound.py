"""Whether the weights inside an ONNX file are, byte for byte, the ones that were meant to go there.

One changed code of a wide layer moves its output too little for any tolerance to see; its bytes cannot hide it.
"""

from collections.abc import Iterable
from pathlib import Path

import onnx

from lrq_export.onnx_file import WeightTensor, read_model


def differing_weight(path: Path, expected: Iterable[WeightTensor]) -> str | None:
    """Name of the first weight that the file lacks or holds with other bytes, type or shape; None if all are right."""
    stored = {tensor.name: tensor for tensor in read_model(path).graph.initializer}
    for weight in expected:
        tensor = stored.get(weight.name)
        if tensor is None or tensor.data_type != weight.onnx_type or tuple(tensor.dims) != tuple(weight.shape):
            return weight.name
        if _bytes(tensor, path.parent) != weight.read():
            return weight.name
    return None


def _bytes(tensor: onnx.TensorProto, folder: Path) -> bytes:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor.raw_data
    place = {entry.key: entry.value for entry in tensor.external_data}
    with open(folder / place["location"], "rb") as file:
        file.seek(int(place["offset"]))
        return file.read(int(place["length"]))
