"""What the tensors of an op of `torch.ops.lrq` must be: the kernels see addresses, and would read past a short one."""

import math
from collections.abc import Sequence

import torch

from graphs.ops import packing, words
from lrq_export.errors import UsageError
from lrq_export.kernels import Format, Layout


def check_tensor(what: str, tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise UsageError unless a tensor is absent, or of a type and of as many elements as `shape` has."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise UsageError(f"{what}: got {tensor.dtype}, needed {dtype}")
    if tensor.numel() != math.prod(shape):
        raise UsageError(f"{what}: got shape {tuple(tensor.shape)}, needed {tuple(shape)}")


def check_channels(what: str, tensor: torch.Tensor | None, channels: int) -> None:
    """Raise UsageError unless a tensor is absent, or has so many channels on its last axis."""
    if tensor is not None and (tensor.ndim == 0 or tensor.shape[-1] != channels):
        raise UsageError(f"{what}: got shape {tuple(tensor.shape)}, needed {channels} channels on the last axis")


def check_weight(codes: torch.Tensor, levels: torch.Tensor | None, form: Sequence[int]) -> None:
    """Raise UsageError unless codes and levels are those of a weight of this form (`WeightForm.values`)."""
    rows, cols, group_size, weight_format, layout, bits, *_ = form
    got, needed = codes.numel() * codes.element_size(), code_bytes(rows, cols, weight_format, layout, bits)
    if got != needed:
        raise UsageError(f"codes: got {got} bytes, needed {needed} for {rows} x {cols} of {bits} bits")
    if weight_format == Format.INT8:
        return
    if levels is None:
        raise UsageError("levels: got none, needed the exponents or the table of the weight")
    each = (2, 3) if weight_format == Format.TWIN_LOG else (2**bits,)
    check_tensor("levels", levels, (rows, cols // group_size, *each), torch.int8)


def code_bytes(rows: int, cols: int, weight_format: int, layout: int, bits: int) -> int:
    """The bytes of the codes of a weight."""
    if weight_format == Format.INT8:
        return rows * cols
    if layout == Layout.WORDS:
        return math.prod(words.words_shape(bits, rows, cols))
    packed = packing.layout(bits)
    return -(-math.prod(packed.shape(rows, cols)) * packed.width * packed.per // 8)
