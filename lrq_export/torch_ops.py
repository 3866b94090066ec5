"""torch.ops.lrq: the dialect's ops on CUDA tensors, by `lrq_export.kernels`; importing this registers them.

    rotate(x, signs, block, prologue, scale, shift, epsilon)            -> y
    rotate_quantize(x, ..., act_bits)                                   -> codes, token_scales
    decode(codes, levels, form)                                         -> w int8 (rows, cols)
    dequantize(codes, levels, scale, form)                              -> W float (rows, cols)
    linear(x, signs, block, weight..., gate, residual, act_bits, ...)   -> y
    linear_quantized(quantized, token_scales, weight..., dtype)         -> y

Each allocates its outputs and runs on the current stream of x's device, so all of it can be captured in a CUDA graph.
Shapes are known without a GPU: torch.compile and torch.export see them. `form` is what `WeightForm.values` gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cache

import torch

from graphs import names
from lrq_export.errors import UsageError
from lrq_export.kernel_operands import check_channels, check_tensor, check_weight
from lrq_export.kernels import (
    Format,
    Kernels,
    Layout,
    Linear,
    Modulation,
    Prologue,
    Rotation,
    Tactic,
    Tokens,
    Type,
    Weight,
    find_library,
    split_tokens,
)

TYPES = {torch.float32: Type.FLOAT, torch.float16: Type.HALF, torch.bfloat16: Type.BFLOAT16}
NORMS = (Prologue.LAYER_NORM, Prologue.RMS_NORM)
ALIGNMENT, VECTOR = 256, 16  # bytes: where a workspace and where a tensor begins


@dataclass(frozen=True)
class WeightForm:
    """What the codes of a weight are: the attributes of its op, as integers that an op of torch can take."""

    rows: int
    cols: int
    group_size: int
    format: Format
    layout: Layout
    bits: int
    fraction_bits: int = names.FRACTION_BITS
    integer_bits: int = names.INTEGER_BITS

    def values(self) -> list[int]:
        return [int(value) for value in astuple(self)]


@cache
def kernels() -> Kernels:
    """The library, loaded at the first call that needs it."""
    return Kernels(find_library())


@torch.library.custom_op("lrq::rotate", mutates_args=(), device_types="cuda")
def rotate(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    block: int,
    prologue: int = 0,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> torch.Tensor:
    y = _rotated(x, prologue, x.dtype)
    _run_rotation(x, signs, block, prologue, scale, shift, epsilon, y, None, 0)
    return y


@rotate.register_fake
def _(x, signs, block, prologue=0, scale=None, shift=None, epsilon=0.0):
    return _rotated(x, prologue, x.dtype)


@torch.library.custom_op("lrq::rotate_quantize", mutates_args=(), device_types="cuda")
def rotate_quantize(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    block: int,
    act_bits: int,
    prologue: int = 0,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = _rotated(x, prologue, torch.int8), _token_scales(x)
    _run_rotation(x, signs, block, prologue, scale, shift, epsilon, codes, scales, act_bits)
    return codes, scales


@rotate_quantize.register_fake
def _(x, signs, block, act_bits, prologue=0, scale=None, shift=None, epsilon=0.0):
    return _rotated(x, prologue, torch.int8), _token_scales(x)


@torch.library.custom_op("lrq::decode", mutates_args=(), device_types="cuda")
def decode(codes: torch.Tensor, levels: torch.Tensor | None, form: Sequence[int]) -> torch.Tensor:
    check_weight(codes, levels, form)
    codes, levels = _ready(codes), _ready(levels)
    decoded = codes.new_empty(tuple(form[:2]), dtype=torch.int8)
    with _current(codes) as stream:
        kernels().decode(_weight(codes, levels, form), decoded.data_ptr(), stream)
    return decoded


@decode.register_fake
def _(codes, levels, form):
    return codes.new_empty(tuple(form[:2]), dtype=torch.int8)


@torch.library.custom_op("lrq::dequantize", mutates_args=(), device_types="cuda")
def dequantize(
    codes: torch.Tensor, levels: torch.Tensor | None, scale: torch.Tensor, form: Sequence[int]
) -> torch.Tensor:
    check_weight(codes, levels, form)
    check_tensor("scale", scale, form[:1], torch.float32)
    codes, levels, scale = _ready(codes), _ready(levels), _ready(scale)
    weight = codes.new_empty(tuple(form[:2]), dtype=torch.float32)
    with _current(codes) as stream:
        kernels().dequantize(_weight(codes, levels, form), scale.data_ptr(), weight.data_ptr(), stream)
    return weight


@dequantize.register_fake
def _(codes, levels, scale, form):
    return codes.new_empty(tuple(form[:2]), dtype=torch.float32)


@torch.library.custom_op("lrq::linear", mutates_args=(), device_types="cuda")
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    levels: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    form: Sequence[int],
    act_bits: int,
    signs: torch.Tensor | None = None,
    block: int = 0,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    decoded: torch.Tensor | None = None,
    tactic: int = 0,
) -> torch.Tensor:
    check_channels("x", x, form[1])
    check_tensor("signs", signs, (form[1],), x.dtype)
    x, y, signs = _ready(x), x.new_empty((*x.shape[:-1], form[0])), _ready(signs)
    if signs is not None and block == 0:
        raise UsageError("signs: got them without a block", hint="say block = 1 for signs alone")
    call = _linear(codes, levels, scale, bias, form, gate, residual, decoded, y, act_bits, tactic)
    call.x, call.block, call.signs = x.data_ptr(), block, _address(signs)
    _run_linear(call, y)
    return y


@linear.register_fake
def _(
    x, codes, levels, scale, bias, form, act_bits, signs=None, block=0, gate=None, residual=None, decoded=None, tactic=0
):
    return x.new_empty((*x.shape[:-1], form[0]))


@torch.library.custom_op("lrq::linear_quantized", mutates_args=(), device_types="cuda")
def linear_quantized(
    quantized: torch.Tensor,
    token_scales: torch.Tensor,
    codes: torch.Tensor,
    levels: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    form: Sequence[int],
    act_bits: int,
    dtype: torch.dtype,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    decoded: torch.Tensor | None = None,
    tactic: int = 0,
) -> torch.Tensor:
    check_channels("quantized", quantized, form[1])
    check_tensor("quantized", quantized, quantized.shape, torch.int8)
    check_tensor("token_scales", token_scales, (*quantized.shape[:-1], 1), torch.float32)
    y = quantized.new_empty((*quantized.shape[:-1], form[0]), dtype=dtype)
    call = _linear(codes, levels, scale, bias, form, gate, residual, decoded, y, act_bits, tactic)
    quantized, token_scales = _ready(quantized), _ready(token_scales)
    call.quantized, call.token_scales = quantized.data_ptr(), token_scales.data_ptr()
    _run_linear(call, y)
    return y


@linear_quantized.register_fake
def _(
    quantized, token_scales, codes, levels, scale, bias, form, act_bits, dtype,
    gate=None, residual=None, decoded=None, tactic=0,
):  # fmt: skip
    return quantized.new_empty((*quantized.shape[:-1], form[0]), dtype=dtype)


def _rotated(x: torch.Tensor, prologue: int, dtype: torch.dtype) -> torch.Tensor:
    channels = x.shape[-1] // 2 if prologue == Prologue.GEGLU else x.shape[-1]
    return x.new_empty((*x.shape[:-1], channels), dtype=dtype)


def _token_scales(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _type(tensor: torch.Tensor) -> Type:
    if tensor.dtype not in TYPES:
        raise UsageError(f"x: got {tensor.dtype}, needed one of {', '.join(map(str, TYPES))}")
    return TYPES[tensor.dtype]


def _ready(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, or a copy of it that the kernels can load vectors from."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % VECTOR else tensor


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@contextmanager
def _current(tensor: torch.Tensor) -> Iterator[int | None]:
    """The stream to enqueue on, with the tensor's device as the current one."""
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def _weight(codes: torch.Tensor, levels: torch.Tensor | None, form: Sequence[int]) -> Weight:
    return Weight(codes.data_ptr(), _address(levels), *form)


def _modulated(
    lead: Sequence[int], tensors: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[Tokens, list[Modulation], list[torch.Tensor]]:
    """Tokens, one Modulation for each tensor, and the tensors that they point into."""
    kept = [_ready(tensor.to(dtype)) for tensor in tensors]
    split = split_tokens(lead, [tensor.shape for tensor in kept])
    if split is None:
        kept = [tensor.expand(*lead, tensor.shape[-1]).contiguous() for tensor in kept]
        split = split_tokens(lead, [tensor.shape for tensor in kept])
    tokens, strides = split
    return tokens, [Modulation(t.data_ptr(), *stride) for t, stride in zip(kept, strides, strict=True)], kept


def _run_rotation(x, signs, block, prologue, scale, shift, epsilon, y, token_scales, act_bits) -> None:
    given = [tensor for tensor in (scale, shift) if tensor is not None]
    if len(given) != (2 if prologue in NORMS else 0):
        raise UsageError(
            f"scale and shift: got {len(given)} of them, needed both for a norm and none for another prologue"
        )
    for what, tensor in (("signs", signs), ("scale", scale), ("shift", shift)):
        check_channels(what, tensor, y.shape[-1])
    x = _ready(x)
    tokens, rows, _kept = _modulated(x.shape[:-1], given, x.dtype)
    signs = None if signs is None else _ready(signs.to(x.dtype))
    rotation = Rotation(
        x.data_ptr(), *(rows or (Modulation(), Modulation())), _address(signs), y.data_ptr(), _address(token_scales),
        tokens, y.shape[-1], block, prologue, epsilon, _type(x), act_bits,
    )  # fmt: skip
    with _current(x) as stream:
        kernels().rotate(rotation, stream)


def _linear(codes, levels, scale, bias, form, gate, residual, decoded, y, act_bits, tactic) -> Linear:
    """A call but for its activations. `kept` on it holds what its pointers need until it has been enqueued."""
    check_weight(codes, levels, form)
    check_tensor("scale", scale, form[:1], torch.float32)
    check_tensor("bias", bias, form[:1], torch.float32)
    check_tensor("decoded", decoded, form[:2], torch.int8)
    check_channels("gate", gate, form[0])
    if residual is not None:
        check_tensor("residual", residual, y.shape, residual.dtype)
    codes, levels, scale, bias, decoded = kept = [_ready(t) for t in (codes, levels, scale, bias, decoded)]
    lead, modulation = y.shape[:-1], Modulation()
    tokens = Tokens(1, math.prod(lead))
    if gate is not None:
        tokens, [modulation], rows = _modulated(lead, [gate], y.dtype)
        kept += rows
    if residual is not None:
        residual = _ready(residual.to(y.dtype))
        kept.append(residual)
    call = Linear(
        weight=_weight(codes, levels, form), decoded=_address(decoded), row_scales=scale.data_ptr(),
        bias=_address(bias), gate=modulation, residual=_address(residual), y=y.data_ptr(), tokens=tokens,
        type=_type(y), act_bits=act_bits, tactic=Tactic(tactic),
    )  # fmt: skip
    call.kept = kept
    return call


def _run_linear(call: Linear, y: torch.Tensor) -> None:
    library = kernels()
    size = library.workspace(call)
    workspace = y.new_empty(size + ALIGNMENT, dtype=torch.uint8)
    address = -(-workspace.data_ptr() // ALIGNMENT) * ALIGNMENT
    with _current(y) as stream:
        library.linear(call, address, size, stream)
