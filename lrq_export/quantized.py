"""The quantized weights on disk: one safetensors file per layer while building, one file for all in the package.

Of a layer: `<layer>.codes` (the packed bytes of `graphs.ops.packing`, or INT8 weights at 8 bits), `<layer>.exponents`,
`<layer>.scale`. Of weights kept in floating point: float32 under their graph name. Metadata `layers` holds the records.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from graphs import names
from graphs.expressions import RotateOutput
from graphs.ops import packing, twin_log_dequant
from lrq_export.checkpoint import TensorFile
from lrq_export.errors import InputError
from lrq_export.onnx_file import WeightTensor
from lrq_export.package import save_tensors_atomic
from lrq_export.quant.linear import QuantizedLinear
from lrq_export.quant.rotation import Rotation

# How a layer's input comes to be rotated.
ONLINE, FOLDED, UNROTATED = "HadamardRotate", "value projection", "nothing"


@dataclass(frozen=True)
class LayerRecord:
    """What was done to one linear layer; everything the report and a second export need to know of it."""

    layer: str
    rows: int
    cols: int
    bits: int
    group_size: int
    act_bits: int
    block: int  # of the rotation on its input, 0 if none
    signs_seed: int | None
    rotated_by: str  # ONLINE, FOLDED or UNROTATED
    reason: str
    output_rotations: list[dict[str, Any]] = field(default_factory=list)  # folded into this layer: block, signs_seed
    bias: str | None = None  # graph name of its bias, None if it has none
    weight_nmse: float = 0.0
    weighted_nmse: float = 0.0  # the same, each column weighted by its input's second moment

    def input_rotation(self) -> Rotation | None:
        """The rotation that the layer's own input goes through when the model runs, None if it was folded away."""
        if self.rotated_by != ONLINE:
            return None
        return Rotation(self.cols, self.block, self.signs_seed)

    def output_steps(self) -> list[RotateOutput]:
        return [RotateOutput(**step) for step in self.output_rotations]


@dataclass(frozen=True)
class LayerTensors:
    """The stored form of one layer's weight."""

    record: LayerRecord
    codes: torch.Tensor  # uint8 (bytes,) as packed, or int8 (rows, cols) at 8 bits
    exponents: torch.Tensor | None  # int8 (rows, groups, 2, 3); None at 8 bits
    scale: torch.Tensor  # float32 (rows,)

    def packed(self) -> packing.Packed:
        record, form = self.record, packing.layout(self.record.bits)
        shape = form.shape(record.rows, record.cols)
        return packing.Packed(record.bits, record.cols, shape, form.onnx_type, self.codes.numpy().tobytes())

    def integer_weight(self) -> torch.Tensor:
        """INT8 (rows, cols), decoded as DESIGN 3 says: W = scale[row] * this."""
        if self.exponents is None:
            return self.codes
        elements, record = packing.elements(self.packed()), self.record
        decoding = {"bits": record.bits, "group_size": record.group_size, "cols": record.cols}
        return torch.from_numpy(twin_log_dequant.integer_weight(elements, self.exponents.numpy(), **decoding))

    def onnx_weights(self) -> list[WeightTensor]:
        """The layer's inputs of the portable graph: codes, exponents, scale."""
        name = self.record.layer
        scale = WeightTensor.of(f"{name}.scale", self.scale.numpy())
        if self.exponents is None:
            return [WeightTensor.of(f"{name}.codes", self.codes.numpy()), scale]
        packed = self.packed()
        codes = WeightTensor(f"{name}.codes", packed.onnx_type, packed.shape, len(packed.raw), lambda: packed.raw)
        return [codes, WeightTensor.of(f"{name}.exponents", self.exponents.numpy()), scale]

    def tensors(self) -> dict[str, torch.Tensor]:
        stored = {"codes": self.codes, "exponents": self.exponents, "scale": self.scale}
        return {f"{self.record.layer}.{role}": tensor for role, tensor in stored.items() if tensor is not None}

    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


class QuantizedFile:
    """Reads what `write_quantized` wrote, one tensor at a time."""

    def __init__(self, path: Path):
        self.file = TensorFile(path)
        try:
            rows = json.loads(self.file.metadata["layers"])
            self.records = {row["layer"]: LayerRecord(**row) for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: its layer records are missing or damaged ({error})") from error

    def layer(self, name: str) -> LayerTensors:
        record = self.records[name]
        exponents = None if record.bits == names.INT8_BITS else self.file.read(f"{name}.exponents")
        return LayerTensors(record, self.file.read(f"{name}.codes"), exponents, self.file.read(f"{name}.scale"))

    def float_names(self) -> list[str]:
        """Graph names of the weights kept in floating point, biases of quantized layers among them."""
        stored = {f"{name}.{role}" for name in self.records for role in ("codes", "exponents", "scale")}
        return [name for name in self.file.entries if name not in stored]

    def read(self, name: str) -> torch.Tensor:
        return self.file.read(name)

    def module(self, name: str) -> QuantizedLinear:
        """The torch layer that computes with exactly these codes."""
        layer = self.layer(name)
        record = layer.record
        bias = None if record.bias is None else self.read(record.bias)
        return QuantizedLinear(layer, bias, act_bits=record.act_bits, rotation=record.input_rotation())


def write_quantized(path: Path, layers: Iterable[LayerTensors], floats: Mapping[str, torch.Tensor]) -> None:
    """Write the package's quantized.safetensors. `layers` in graph order; all tensors are held while writing."""
    layers = list(layers)
    tensors = dict(floats)
    for layer in layers:
        tensors |= layer.tensors()
    records = json.dumps([asdict(layer.record) for layer in layers], sort_keys=True)
    save_tensors_atomic(path, tensors, {"format": "lrq-export quantized weights", "layers": records})


def as_bytes(packed: packing.Packed) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(packed.raw, np.uint8).copy())


def onnx_float(name: str, tensor: torch.Tensor) -> WeightTensor:
    array = tensor.to(torch.float32).contiguous().numpy()
    return WeightTensor(name, onnx.TensorProto.FLOAT, array.shape, array.nbytes, array.tobytes)
