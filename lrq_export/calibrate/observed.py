"""What calibration saw of every planned layer's input, on disk: statistics, some tokens, E[x xᵀ].

Everything is in the basis of the model, before any rotation. Layers that read the same tensor, such as the query, key
and value projections of one attention, share tokens and correlations, and must be rotated alike.
"""

import json
from pathlib import Path

import torch

from lrq_export.calibrate.statistics import Statistics
from lrq_export.calibrate.tokens import TIMESTEPS
from lrq_export.checkpoint import TensorFile
from lrq_export.package import STATS

TOKENS, CORRELATIONS, READS = "tokens.safetensors", "correlations-{}.safetensors", "reads"


class Observed:
    """Reads what `calibrate.run.observe` wrote into `folder`, one layer at a time."""

    def __init__(self, folder: Path, statistics: Path | None = None):
        """`statistics` is where stats.safetensors lies if not in `folder`. Raises InputError for damaged files."""
        self.statistics = Statistics.load(statistics or folder / STATS)
        self._tokens = TensorFile(folder / TOKENS)
        self._input_of: dict[str, str] = json.loads(self._tokens.metadata[READS])
        self._correlations: dict[str, TensorFile] = {}
        for path in sorted(folder.glob(CORRELATIONS.format("*"))):
            file = TensorFile(path)
            self._correlations |= dict.fromkeys(file.entries, file)

    def siblings(self) -> list[list[str]]:
        """Layers that read one input, together, in the order in which the model runs them."""
        groups: dict[str, list[str]] = {}
        for layer, first in self._input_of.items():
            groups.setdefault(first, []).append(layer)
        return list(groups.values())

    def tokens(self, layer: str) -> torch.Tensor:
        """float32 (tokens, cols)."""
        return self._tokens.read(self._input_of[layer])

    def timesteps(self, layer: str) -> torch.Tensor:
        """float32 (tokens,): the timestep of each of `tokens`."""
        return self._tokens.read(self._input_of[layer] + TIMESTEPS)

    def correlation(self, layer: str) -> torch.Tensor | None:
        """E[x xᵀ] float32 (cols, cols); None when none were collected."""
        first = self._input_of[layer]
        file = self._correlations.get(first)
        return None if file is None else file.read(first)
