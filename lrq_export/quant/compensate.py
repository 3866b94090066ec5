"""Round a weight column by column, carrying each column's rounding error into the columns still to come.

Minimises the layer's output error tr (W - Ŵ) H (W - Ŵ)ᵀ, H = E[x xᵀ], instead of the weight error (GPTQ, Frantar et al.
2022, with its Cholesky form and damping); here the grid is any codebook per row and group. With U the upper Cholesky
factor of H⁻¹ and e_j = (w_j - ŵ_j) / U_jj, the columns k > j become w_k - e_j U_jk.
"""

from __future__ import annotations

import torch

DAMPING = 0.01  # share of the mean of H's diagonal that is added to it: H of few samples is singular
BLOCK = 128  # columns that are updated one by one before the rest is updated at once


def round_compensated(
    weight: torch.Tensor, values: torch.Tensor, group_size: int, second_moments: torch.Tensor
) -> torch.Tensor:
    """Index uint8 (rows, cols) of the value chosen for each weight (rows, cols).

    `values` (rows, groups, n) are the codebooks, n <= 256; `second_moments` is H (cols, cols), symmetric, PSD.
    """
    factor = inverse_factor(second_moments)
    remaining = weight.to(torch.float32).clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        block, errors = remaining[:, start:stop], torch.empty(len(weight), stop - start)
        for column in range(stop - start):
            table = values[:, (start + column) // group_size]
            chosen = (table - block[:, column, None]).abs().argmin(dim=1)
            rounded = table.gather(1, chosen[:, None])[:, 0]
            error = (block[:, column] - rounded) / factor[start + column, start + column]
            block[:, column + 1 :] -= error[:, None] * factor[start + column, start + column + 1 : stop]
            codes[:, start + column], errors[:, column] = chosen.to(torch.uint8), error
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def inverse_factor(second_moments: torch.Tensor) -> torch.Tensor:
    """U float32 (cols, cols), upper triangular, Uᵀ U = (H + damping)⁻¹; computed in float64."""
    damped = second_moments.to(torch.float64).clone()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
