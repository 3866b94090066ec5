"""Per-token dynamic symmetric quantization of activations: each token is scaled by its own largest magnitude."""

from __future__ import annotations

import torch

from lrq_export.errors import UsageError


def largest_integer(bits: int) -> int:
    """2^(bits-1) - 1: 127 for 8 bits, 31 for 6."""
    if not 2 <= bits <= 8:
        raise UsageError(f"activation bits: got {bits}, needed 2 to 8 (16 keeps activations in floating point)")
    return 2 ** (bits - 1) - 1


def quantize_tokens(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q and s with x ~ q s: q float32 (..., n) with integer values in +-(2^(bits-1) - 1), s float32 (..., 1).

    s = max|x| / (2^(bits-1) - 1) over the last axis, in float32; q = clamp(round_half_even(x / s)).
    A token of zeros has s = 1.
    """
    top = largest_integer(bits)
    x = x.float()
    s = x.abs().amax(-1, keepdim=True) / top
    s = torch.where(s == 0, torch.ones_like(s), s)
    return torch.round(x / s).clamp(-top, top), s


def rounded_tokens(x: torch.Tensor, bits: int) -> torch.Tensor:
    """q s float32, the values that quantized tokens x (..., n) stand for."""
    q, s = quantize_tokens(x, bits)
    return q * s
