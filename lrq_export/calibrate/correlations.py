"""E[x xᵀ] of every planned layer's input: what error-compensated rounding and the choice of rotations need.

One (cols, cols) matrix for each input; layers that read the same one share it. In the basis of the model, before any
rotation: with x R in place of x it becomes Rᵀ E[x xᵀ] R. Matrices beyond a limit of memory wait for another pass over
the calibration inputs.
"""

from pathlib import Path

import torch

from lrq_export.package import save_tensors_atomic

MEMORY_LIMIT = 1 << 30  # bytes of the matrices of one pass


class Correlations:
    """Sums of x xᵀ by layer, float32; the same calls in the same order give the same bytes."""

    def __init__(self, skip: frozenset[str] = frozenset(), limit: int = MEMORY_LIMIT) -> None:
        """Layers in `skip` are not collected: an earlier pass has them."""
        self._skip, self._limit, self._bytes = skip, limit, 0
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self.waiting: set[str] = set()  # layers that did not fit

    @property
    def layers(self) -> frozenset[str]:
        return frozenset(self._sums)

    def observe(self, layer: str, x: torch.Tensor) -> None:
        """Add an input x (..., cols), or leave its layer to the next pass. At least one layer fits, however large."""
        if layer in self._skip or layer in self.waiting:
            return
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        size = 4 * rows.shape[1] ** 2
        if layer not in self._sums:
            if self._sums and self._bytes + size > self._limit:
                self.waiting.add(layer)
                return
            self._bytes += size
        product = rows.T @ rows
        self._sums[layer] = self._sums[layer].add_(product) if layer in self._sums else product
        self._tokens[layer] = self._tokens.get(layer, 0) + len(rows)

    def save(self, path: Path) -> None:
        """Write the means, E[x xᵀ], by layer."""
        save_tensors_atomic(path, {layer: total / self._tokens[layer] for layer, total in self._sums.items()})
