"""The quantized weights on disk: one safetensors file per layer while building, one file for all in the package.

Of a layer: `<layer>.codes` (the packed bytes of `graphs.ops.packing`, or INT8 weights at 8 bits), `<layer>.scale`, and
what its codes mean: `<layer>.exponents` or, of a codebook, `<layer>.table`. Of weights kept in floating point: float32
under their graph name. Metadata `layers` holds the records.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import onnx
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from graphs import equalizer, names
from graphs.expressions import RotateOutput
from graphs.ops import codebook_dequant, packing, twin_log_dequant, words
from lrq_export.checkpoint import TensorFile
from lrq_export.errors import CheckFailed, InputError, UsageError
from lrq_export.onnx_file import WeightTensor
from lrq_export.package import save_tensors_atomic
from lrq_export.quant.linear import QuantizedLinear
from lrq_export.quant.rotation import PartialRotation, Rotation

# How a layer's input comes to be rotated.
ONLINE, FOLDED, UNROTATED = "HadamardRotate", "the layer before it", "nothing"
# What is stored to give codes their meaning, by method: a role of `names.WEIGHT_ROLES`.
LEVELS = {names.TWIN_LOG: "exponents", names.CODEBOOK: "table"}
_FLOAT = np.dtype(np.float32)
Size = Annotated[int, Field(ge=1)]


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True)
class LayerRecord:
    """What was done to one linear layer; everything the report and a second export need to know of it."""

    layer: str
    rows: Size
    cols: Size
    bits: Literal[2, 3, 4, 8]
    group_size: Size
    act_bits: Literal[4, 6, 8, 16]
    block: Annotated[int, Field(ge=0)]  # of the rotation on its input, 0 if none
    signs_seed: int | None
    rotated_by: str  # ONLINE, FOLDED or UNROTATED
    reason: str
    output_rotations: list[dict[str, Any]] = field(
        default_factory=list
    )  # folded into this layer: of expressions.Rotation
    bias: str | None = None  # graph name of its bias, None if it has none
    weight_nmse: float = 0.0
    weighted_nmse: float = 0.0  # the same, each column weighted by its input's second moment
    method: str = names.TWIN_LOG  # of its codes; says nothing at 8 bits
    equalizer: str | None = None  # divisors of its input channels (`graphs.equalizer`), before the rotation
    online_channels: list[int] | None = None  # the first, and the one behind the last; None: all that ONLINE says

    def __post_init__(self):
        if self.method not in LEVELS:
            raise ValueError(f"{self.layer}: method {self.method!r}, needed one of {', '.join(LEVELS)}")

    def roles(self) -> tuple[str, ...]:
        """The tensors that hold its weight: `<layer>.<role>` on disk, inputs of its node in the graph."""
        return ("codes", "scale") if self.bits == names.INT8_BITS else ("codes", LEVELS[self.method], "scale")

    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each of those tensors, by role."""
        groups = -(-self.cols // self.group_size)
        forms = {
            "scale": (torch.float32, (self.rows,)),
            "exponents": (torch.int8, (self.rows, groups, 2, 3)),
            "table": (torch.int8, (self.rows, groups, 2**self.bits)),
        }
        if self.bits == names.INT8_BITS:
            forms["codes"] = (torch.int8, (self.rows, self.cols))
        else:
            forms["codes"] = (torch.uint8, (packing.layout(self.bits).raw_bytes(self.rows, self.cols),))
        return {role: forms[role] for role in self.roles()}

    def rotation(self) -> Rotation | None:
        """The rotation of its input, None if there is none."""
        return Rotation(self.cols, self.block, self.signs_seed, self.equalizer) if self.block else None

    def input_rotation(self) -> Rotation | PartialRotation | None:
        """The rotation that the layer's own input goes through when the model runs, None if it was folded away."""
        if self.online_channels is not None:
            return self._part(*self.online_channels)
        return self.rotation() if self.rotated_by == ONLINE else None

    def folded_rotation(self) -> Rotation | PartialRotation | None:
        """The rotation of its input that the layer before it has in its weights, None if there is none."""
        if self.online_channels is not None:
            start, stop = self.online_channels
            return self._part(0, start) if start else self._part(stop, self.cols)
        return self.rotation() if self.rotated_by == FOLDED else None

    def _part(self, start: int, stop: int) -> PartialRotation:
        """The rotation of some of the channels; `commute_rotation` divides none whose signs are drawn."""
        divisors = None if self.equalizer is None else equalizer.part(self.equalizer, start, stop)
        return PartialRotation(self.cols, start, Rotation(stop - start, self.block, None, divisors))

    def output_steps(self) -> list[RotateOutput]:
        return [RotateOutput(**step) for step in self.output_rotations]


@dataclass(frozen=True)
class LayerTensors:
    """The stored form of one layer's weight."""

    record: LayerRecord
    codes: torch.Tensor  # uint8 (bytes,) as packed, or int8 (rows, cols) at 8 bits
    scale: torch.Tensor  # float32 (rows,)
    exponents: torch.Tensor | None = None  # int8 (rows, groups, 2, 3) of twin-log codes
    table: torch.Tensor | None = None  # int8 (rows, groups, 2^bits) of a codebook

    def packed(self) -> packing.Packed:
        record, form = self.record, packing.layout(self.record.bits)
        shape = form.shape(record.rows, record.cols)
        return packing.Packed(record.bits, record.cols, shape, form.onnx_type, self.codes.numpy().tobytes())

    def integer_weight(self) -> torch.Tensor:
        """INT8 (rows, cols), decoded as its op does (`graphs.ops`): W = scale[row] * this."""
        record = self.record
        if record.bits == names.INT8_BITS:
            return self.codes
        elements = packing.elements(self.packed())
        decoding = {"bits": record.bits, "group_size": record.group_size, "cols": record.cols}
        if self.table is not None:
            return torch.from_numpy(codebook_dequant.integer_weight(elements, self.table.numpy(), **decoding))
        return torch.from_numpy(twin_log_dequant.integer_weight(elements, self.exponents.numpy(), **decoding))

    def level_table(self) -> torch.Tensor | None:
        """INT8 (rows, groups, 2^bits), the integer that each code stands for; None at 8 bits: there are no codes."""
        if self.exponents is None:
            return self.table
        return torch.from_numpy(twin_log_dequant.table(self.exponents.numpy(), self.record.bits)).to(torch.int8)

    def onnx_weights(self, layout: str = names.STORAGE) -> list[WeightTensor]:
        """The layer's inputs of the graph, in the order of its node, which reads codes in `layout`."""
        codes, *others = self.tensors().items()
        return [self._onnx_codes(codes[0], layout), *(WeightTensor.of(name, each.numpy()) for name, each in others)]

    def _onnx_codes(self, name: str, layout: str) -> WeightTensor:
        record = self.record
        if record.bits == names.INT8_BITS:
            return WeightTensor.of(name, self.codes.numpy())
        if layout == names.WORDS:
            shape = words.words_shape(record.bits, record.rows, record.cols)
            return WeightTensor(
                name, onnx.TensorProto.INT8, shape, math.prod(shape),
                lambda: words.prepack(packing.unpack(self.packed()), record.bits).tobytes(),
            )  # fmt: skip
        packed = self.packed()
        return WeightTensor(name, packed.onnx_type, packed.shape, len(packed.raw), lambda: packed.raw)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{self.record.layer}.{role}": getattr(self, role) for role in self.record.roles()}

    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


_RECORDS = TypeAdapter(list[LayerRecord])


class QuantizedFile:
    """Reads what `write_quantized` wrote, one tensor at a time.

    Raises InputError for a file whose records are not of its tensors.
    """

    def __init__(self, path: Path):
        self.file = TensorFile(path)
        self.records = {record.layer: record for record in _records(self.file)}
        for name, record in self.records.items():
            for role, (dtype, shape) in record.stored().items():
                entry = self.file.entry(f"{name}.{role}")
                if (entry.dtype, entry.shape) != (dtype, shape):
                    raise _damaged(path, f"{name}.{role} is {entry.dtype} {entry.shape}, needed {dtype} {shape}")
            _check_rotations(path, record)
            if record.bias is not None and self.file.entry(record.bias).shape != (record.rows,):
                raise _damaged(path, f"{record.bias} has another shape than a bias of {name}, ({record.rows},)")

    def layer(self, name: str) -> LayerTensors:
        """Raises InputError for a layer that was not quantized."""
        if name not in self.records:
            raise InputError(f"{self.file.path}: no layer {name}", hint="build the package again")
        record = self.records[name]
        return LayerTensors(record, **{role: self.file.read(f"{name}.{role}") for role in record.roles()})

    def float_names(self) -> list[str]:
        """Graph names of the weights kept in floating point, biases of quantized layers among them."""
        stored = {f"{name}.{role}" for name, record in self.records.items() for role in record.roles()}
        return [name for name in self.file.entries if name not in stored]

    def read(self, name: str) -> torch.Tensor:
        return self.file.read(name)

    def module(self, name: str) -> QuantizedLinear:
        """The torch layer that computes with exactly these codes."""
        layer = self.layer(name)
        record = layer.record
        bias = None if record.bias is None else self.read(record.bias)
        return QuantizedLinear(layer, bias, act_bits=record.act_bits, rotation=record.input_rotation())


def _records(file: TensorFile) -> list[LayerRecord]:
    try:
        return _RECORDS.validate_json(file.metadata["layers"])
    except KeyError:
        raise _damaged(file.path, "there are none") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(file.path, f"{where}: {first['msg']}" if where else first["msg"]) from error


def _check_rotations(path: Path, record: LayerRecord) -> None:
    """Raise InputError for rotations of another width than their layer's, or of no Hadamard matrix."""
    ends = record.online_channels
    try:
        if ends is not None and not (len(ends) == 2 and 0 <= ends[0] < ends[1] <= record.cols):
            raise ValueError(f"online_channels are {ends}, needed two of {record.cols}")
        rotations = [record.rotation] if ends is None else [record.input_rotation, record.folded_rotation]
        for rotation in rotations:
            rotation()
        for step in record.output_steps():
            step.output_shape((record.rows, record.cols))
    except (TypeError, ValueError, UsageError) as error:
        raise _damaged(path, f"{record.layer}: {error}") from error


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path}: its layer records are missing or damaged: {why}", hint="build the package again")


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


def onnx_float(name: str, tensor: torch.Tensor, element: np.dtype = _FLOAT) -> WeightTensor:
    """A weight kept in floating point, rounded to `element`. Raises CheckFailed where that has no number as large."""
    array = tensor.to(torch.float32).contiguous().numpy()
    if element != _FLOAT:
        largest = float(abs(array).max(initial=0))
        if largest > float(ml_dtypes.finfo(element).max):
            raise CheckFailed(
                f"{name}: got a weight of magnitude {largest:.6g}, needed one that {element.name} holds",
                hint="set engine.activations to float32 or bfloat16",
            )
        array = array.astype(element)
    onnx_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return WeightTensor(name, onnx_type, array.shape, array.nbytes, array.tobytes)
