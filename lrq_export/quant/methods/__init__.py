"""Every weight quantizer by name, behind one interface, for comparison: W (rows, cols) in, codes and values out.

A method that no graph of ours can hold says why; it can still be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lrq_export.quant import codebook, twin_log
from lrq_export.quant.codebook_weight import CodebookWeight
from lrq_export.quant.methods import (
    log2,
    shift_uniform_log2,
    tlq_paper,
    tlq_released,
    twin_uniform,
    uniform_affine,
)

Quantize = Callable[..., CodebookWeight]


@dataclass(frozen=True)
class Method:
    """`quantize(weight, second_moment, bits=...)`; `obstacle` is None, or why it cannot be deployed."""

    name: str
    quantize: Quantize
    source: str
    obstacle: str | None = None


def _twin_log(weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int) -> CodebookWeight:
    quantized = twin_log.quantize(weight, second_moment, bits=bits)
    levels = twin_log.level_table(quantized.exponents, bits).float() * quantized.scale[:, None, None, None]
    return CodebookWeight(quantized.codes, torch.cat([levels[:, :, 0], -levels[:, :, 1]], dim=-1))


def _codebook(weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int) -> CodebookWeight:
    quantized = codebook.quantize(weight, second_moment, bits=bits)
    return CodebookWeight(quantized.codes, quantized.values())


_FLOATS = "its levels are floats, not INT8 numbers"
_METHODS = (
    Method("tlq", _twin_log, "LRQ-DiT on the integer grid of docs/methods.md"),
    Method("tlq_paper", tlq_paper.quantize, "LRQ-DiT, text", "its levels span more octaves than INT8 numbers do"),
    Method("tlq_released", tlq_released.quantize, "LRQ-DiT, code, kept to 2^b codes", _FLOATS),
    Method(
        "tlq_released_as_is", partial(tlq_released.quantize, exact_codes=False), "LRQ-DiT, code",
        "it has 2^b + 2 values, which b bits cannot hold",
    ),
    Method("codebook", _codebook, "Lloyd 1982"),
    Method("uniform_minmax", partial(uniform_affine.quantize, search=False), "every paper's baseline", _FLOATS),
    Method("uniform_clip", partial(uniform_affine.quantize, search=True), "every paper's baseline", _FLOATS),
    Method("twin_uniform", twin_uniform.quantize, "PTQ4ViT", _FLOATS),
    Method("log2", log2.quantize, "powers of two", _FLOATS),
    Method("log_sqrt2", partial(log2.quantize, per_octave=2), "RepQ-ViT", _FLOATS),
    Method("shift_uniform_log2", shift_uniform_log2.quantize, "I&S-ViT", _FLOATS),
)  # fmt: skip
METHODS = {method.name: method for method in _METHODS}
