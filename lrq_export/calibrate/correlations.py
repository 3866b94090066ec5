"""E[x xᵀ] of every planned layer's input, in the basis of its weight: what error-compensated rounding needs.

One (cols, cols) matrix a layer. They live beside the unfinished package, not in it.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from lrq_export.checkpoint import TensorFile
from lrq_export.package import save_tensors_atomic
from lrq_export.plan import LayerPlan

MEMORY_LIMIT = 1 << 30  # bytes of all matrices together; a model beyond it is rounded to nearest


def required_bytes(plans: Iterable[LayerPlan]) -> int:
    return sum(4 * plan.cols**2 for plan in plans)


class Correlations:
    """Sums of x xᵀ by layer, float32; the same calls in the same order give the same bytes."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}

    def observe(self, layer: str, x: torch.Tensor) -> None:
        """Add an input x (..., cols), already rotated as its weight is."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        product = rows.T @ rows
        self._sums[layer] = self._sums[layer].add_(product) if layer in self._sums else product
        self._tokens[layer] = self._tokens.get(layer, 0) + len(rows)

    def save(self, path: Path) -> None:
        """Write the means, E[x xᵀ], by layer."""
        save_tensors_atomic(path, {layer: total / self._tokens[layer] for layer, total in self._sums.items()})


def read_correlation(path: Path, layer: str) -> torch.Tensor | None:
    """E[x xᵀ] (cols, cols) of one layer; None when none were collected."""
    return TensorFile(path).read(layer) if path.exists() else None
