"""Round a weight column by column, carrying each column's rounding error into the columns still to come.

Minimises the layer's output error tr (W - Ŵ) H (W - Ŵ)ᵀ, H = E[x xᵀ], instead of the weight error (GPTQ, Frantar et al.
2022, with its Cholesky form, damping and order of columns); here the grid is any codebook per row and group. With U the
upper Cholesky factor of H⁻¹ and e_j = (w_j - ŵ_j) / U_jj, the columns k > j become w_k - e_j U_jk.

Carried errors reach beyond the range that the codebook was fitted to, so each row also tries wider codebooks and keeps
the one that ends with the least output error. This is worth more at 3 bits than anything else here (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DAMPING = 0.01  # share of the mean of H's diagonal that is added to it: H of few samples is singular
BLOCK = 128  # columns that are updated one by one before the rest is updated at once
WIDENINGS = (1.0, 1.15, 1.3)  # of a codebook fitted to the weight error; each row keeps its best


@dataclass(frozen=True)
class Rounding:
    """Codes into codebooks, each row's codebook times its widening."""

    codes: torch.Tensor  # uint8 (rows, cols)
    widening: torch.Tensor  # float32 (rows,)


def round_compensated(
    weight: torch.Tensor,
    values: torch.Tensor,
    group_size: int,
    second_moments: torch.Tensor,
    *,
    widenings: tuple[float, ...] = WIDENINGS,
) -> Rounding:
    """The codes of the weight (rows, cols) in the codebooks `values` (rows, groups, n), n <= 256, and their widening.

    `second_moments` is H (cols, cols), symmetric, PSD. Columns are rounded in the order of falling H_jj: the errors of
    the inputs that matter most find the most columns to be made good in.
    """
    order = second_moments.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(second_moments[order][:, order])
    tried = torch.cat([values * widening for widening in widenings])
    ordered = weight.to(torch.float32)[:, order].repeat(len(widenings), 1)
    codes, errors = _round(ordered, tried, order // group_size, factor)
    best = errors.view(len(widenings), -1).argmin(0)
    chosen = codes.view(len(widenings), *weight.shape)[best, torch.arange(len(weight))]
    return Rounding(chosen[:, order.argsort()], torch.tensor(widenings)[best])


def _round(
    remaining: torch.Tensor, values: torch.Tensor, groups: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 (rows, cols) and output errors float64 (rows,); changes `remaining`. groups (cols,) picks codebooks.

    The squares of e add up to (w - ŵ)(H + damping)(w - ŵ)ᵀ.
    """
    rows, cols = remaining.shape
    codes, total = torch.empty(rows, cols, dtype=torch.uint8), torch.zeros(rows, dtype=torch.float64)
    group_of = groups.tolist()
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        block, errors = remaining[:, start:stop], torch.empty(rows, stop - start)
        for column in range(stop - start):
            table = values[:, group_of[start + column]]
            chosen = (table - block[:, column, None]).abs().argmin(dim=1)
            rounded = table.gather(1, chosen[:, None])[:, 0]
            error = (block[:, column] - rounded) / factor[start + column, start + column]
            block[:, column + 1 :] -= error[:, None] * factor[start + column, start + column + 1 : stop]
            codes[:, start + column], errors[:, column] = chosen.to(torch.uint8), error
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
        total += errors.double().square().sum(1)
    return codes, total


def inverse_factor(second_moments: torch.Tensor) -> torch.Tensor:
    """U float32 (cols, cols), upper triangular, Uᵀ U = (H + damping)⁻¹; computed in float64."""
    damped = second_moments.to(torch.float64).clone()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
