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
    """`quantize(weight, second_moment, bits=...)`; `obstacle` is None, or why it cannot be deployed.

    Beside its codes a weight needs `row_bits` for each row and group_bits(bits) for each (row, group): as our packages
    store them, and for methods without a package of ours 16 bits for every scale, zero point or offset.
    """

    name: str
    quantize: Quantize
    source: str
    row_bits: int
    group_bits: Callable[[int], int]
    obstacle: str | None = None

    def bits_per_weight(self, bits: int, cols: int, groups: int = 1) -> float:
        return bits + (self.row_bits + groups * self.group_bits(bits)) / cols


def _twin_log(
    weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int, group_size: int | None = None
) -> CodebookWeight:
    quantized = twin_log.quantize(weight, second_moment, bits=bits, group_size=group_size)
    return CodebookWeight(quantized.codes, quantized.codebooks())


def _codebook(
    weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, bits: int, group_size: int | None = None
) -> CodebookWeight:
    quantized = codebook.quantize(weight, second_moment, bits=bits, group_size=group_size)
    return CodebookWeight(quantized.codes, quantized.codebooks())


_FLOATS = "its levels are floats, not INT8 numbers"


def _numbers(count: int) -> Callable[[int], int]:
    """Side data of `count` half-precision numbers."""
    return lambda bits: 16 * count


_METHODS = (
    Method("tlq", _twin_log, "LRQ-DiT on the integer grid of docs/methods.md", 32, lambda bits: 48),
    Method(
        "tlq_paper", tlq_paper.quantize, "LRQ-DiT, text", 0, _numbers(4),
        "its levels span more octaves than INT8 numbers do",
    ),
    Method("tlq_released", tlq_released.quantize, "LRQ-DiT, code, kept to 2^b codes", 0, _numbers(4), _FLOATS),
    Method(
        "tlq_released_as_is", partial(tlq_released.quantize, exact_codes=False), "LRQ-DiT, code", 0, _numbers(4),
        "it has 2^b + 2 values, which b bits cannot hold",
    ),
    Method("codebook", _codebook, "Lloyd 1982", 32, lambda bits: 8 * 2**bits),
    Method(
        "uniform_minmax", partial(uniform_affine.quantize, search=False), "every paper's baseline", 0, _numbers(2),
        _FLOATS,
    ),
    Method(
        "uniform_clip", partial(uniform_affine.quantize, search=True), "every paper's baseline", 0, _numbers(2),
        _FLOATS,
    ),
    Method("twin_uniform", twin_uniform.quantize, "PTQ4ViT", 0, _numbers(2), _FLOATS),
    Method("log2", log2.quantize, "powers of two", 0, _numbers(2), _FLOATS),
    Method("log_sqrt2", partial(log2.quantize, per_octave=2), "RepQ-ViT", 0, _numbers(2), _FLOATS),
    Method("shift_uniform_log2", shift_uniform_log2.quantize, "I&S-ViT", 0, _numbers(4), _FLOATS),
)  # fmt: skip
METHODS = {method.name: method for method in _METHODS}
