"""A quantized model in plain PyTorch on a GPU: its linear layers on `torch.ops.lrq`, the rest as it is.

>>> model = put_on_kernels(quantized_model(family, config, quantized), quantized).to("cuda", torch.bfloat16)

The layers compute with exactly the package's codes, which stay packed in memory. Activations are rounded to the type of
the model between rotation and quantization, as in the deployed graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

import lrq_export.torch_ops  # noqa: F401  registers torch.ops.lrq
from graphs import names
from graphs.ops import packing, words
from lrq_export.kernels import Format, Layout
from lrq_export.quant.rotation import PartialRotation, Rotation
from lrq_export.quantized import LayerTensors, QuantizedFile
from lrq_export.torch_ops import WeightForm

FORMATS = {names.TWIN_LOG: Format.TWIN_LOG, names.CODEBOOK: Format.CODEBOOK}
KEPT_FLOAT = ("scale", "bias")  # float32 in a model of any type


class KernelLinear(nn.Module):
    """y = quantized(x R) w^T, scaled back, plus bias: `QuantizedLinear` on a GPU.

    resident: decode the weight once and keep it as INT8 (twice the memory of 4-bit codes) instead of at every call.
    """

    def __init__(
        self,
        layer: LayerTensors,
        bias: torch.Tensor | None = None,
        *,
        act_bits: int = 8,
        rotation: Rotation | PartialRotation | None = None,
        resident: bool = False,
    ):
        super().__init__()
        self.form = form_of(layer)
        self.act_bits, self.resident = act_bits, resident
        self.in_features, self.out_features = self.form.cols, self.form.rows
        self.start = rotation.start if isinstance(rotation, PartialRotation) else 0
        whole = rotation.rotation if isinstance(rotation, PartialRotation) else rotation
        self.is_partial = isinstance(rotation, PartialRotation)
        self.block = 0 if whole is None else whole.block
        self.decoded = None  # of a resident weight, once it has been called
        buffers = {
            "codes": _codes(layer),
            "levels": layer.table if layer.exponents is None else layer.exponents,
            "scale": layer.scale.float(),
            "bias": None if bias is None else bias.detach().float(),
            "signs": None if whole is None else whole.factors.float(),
        }
        for name, tensor in buffers.items():
            if tensor is None:
                setattr(self, name, None)  # torch.export 2.13 miscounts buffers that are None
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) float, half or bfloat16 -> (..., out_features) of the same type."""
        signs, block = self.signs, self.block
        if block and (self.is_partial or self.act_bits == names.FLOATING_POINT):
            x, signs, block = self._rotated(x), None, 0
        form = self.form.values()
        if self.act_bits == names.FLOATING_POINT:
            weight = torch.ops.lrq.dequantize(self.codes, self.levels, self.scale, form)
            return linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.resident and self.decoded is None:
            self.decoded = torch.ops.lrq.decode(self.codes, self.levels, form)
        signs = None if signs is None else signs.to(x.dtype)
        return torch.ops.lrq.linear(
            x, self.codes, self.levels, self.scale, self.bias, form, self.act_bits, signs, block, decoded=self.decoded
        )

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.form}, act_bits={self.act_bits}, block={self.block}"

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        stop = self.start + len(self.signs)
        part = torch.ops.lrq.rotate(x[..., self.start : stop], self.signs.to(x.dtype), self.block)
        return torch.cat([x[..., : self.start], part, x[..., stop:]], dim=-1) if self.is_partial else part

    def _apply(self, fn: Callable, recurse: bool = True) -> KernelLinear:
        """Moves with its model, but scale and bias stay float32 whatever type that takes."""
        kept = {name: getattr(self, name) for name in KEPT_FLOAT}
        super()._apply(fn, recurse)
        self.decoded = None
        for name, tensor in kept.items():
            if tensor is not None:
                setattr(self, name, tensor.to(self.codes.device))
        return self


def form_of(layer: LayerTensors) -> WeightForm:
    """What the codes are once they lie in words."""
    record = layer.record
    if record.bits == names.INT8_BITS:
        return WeightForm(record.rows, record.cols, record.cols, Format.INT8, Layout.STORAGE, record.bits)
    return WeightForm(record.rows, record.cols, record.group_size, FORMATS[record.method], Layout.WORDS, record.bits)


def put_on_kernels(model: nn.Module, quantized: QuantizedFile, *, resident: bool = False) -> nn.Module:
    """The model, in place, with every quantized layer of the package on the kernels."""
    for name, record in quantized.records.items():
        bias = None if record.bias is None else quantized.read(record.bias)
        layer = KernelLinear(
            quantized.layer(name), bias, act_bits=record.act_bits, rotation=record.input_rotation(), resident=resident
        )
        model.set_submodule(name, layer)
    return model


def _codes(layer: LayerTensors) -> torch.Tensor:
    record = layer.record
    if record.bits == names.INT8_BITS:
        return layer.codes
    return torch.from_numpy(words.prepack(packing.unpack(layer.packed()), record.bits))
