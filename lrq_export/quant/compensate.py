"""Round a weight column by column, carrying each column's rounding error into the columns still to come.

Minimises the layer's output error tr (W - Ŵ) H (W - Ŵ)ᵀ, H = E[x xᵀ], instead of the weight error (GPTQ, Frantar et al.
2022, with its Cholesky form, damping and order of columns); here the grid is any codebook per row and group. With U the
upper Cholesky factor of H⁻¹ and e_j = (w_j - ŵ_j) / U_jj, the columns k > j become w_k - e_j U_jk, and the squares of e
add up to the output error.

So what a column's error costs in the end is 1 / U_jj², the part of its input that the later ones cannot make good, and
what is rounded is not W but W with the errors carried into it. Codebooks are fitted to that: weighted by 1 / U_jj², a
second time to the carried weights, and wider than fits best, since carried errors reach out of the range. Each row
keeps what ends with the least output error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch

# Share of the mean of H's diagonal that is added to it: H of few samples is singular. GPTQ adds 0.01; where a few
# outlier channels make most of that mean, so much drowns all others.
DAMPING = 0.001
GPTQ_DAMPING = 0.01
BLOCK = 64  # columns that are updated one by one before the rest is updated at once
WIDENINGS = (1.0, 1.15, 1.3)  # of a fitted codebook, tried on every row
REFITS = 1  # fits to carried weights, after the one to the weights themselves


class Codes(Protocol):
    """A quantized weight, a frozen dataclass whose tensors all have the rows as their first axis."""

    def codebooks(self) -> torch.Tensor:
        """The value of every code, float32 (rows, groups, n), n <= 256."""

    def rerounded(self, codes: torch.Tensor, widening: torch.Tensor) -> Codes:
        """Other codes uint8 (rows, cols) in the same codebooks, each row's times its widening (rows,)."""


Quantized = TypeVar("Quantized", bound=Codes)
Fit = Callable[[torch.Tensor, torch.Tensor], Quantized]  # (W (rows, cols), importance (cols,)) to its codes


def quantize_compensated(
    weight: torch.Tensor,
    feedback: Feedback,
    fit: Fit,
    *,
    widenings: tuple[float, ...] = WIDENINGS,
    refits: int = REFITS,
) -> Quantized:
    """W (rows, cols) in codebooks that `fit` makes, rounded for the least output error under the H of `feedback`."""
    fitted = fit(weight, feedback.importance)
    rounding = feedback.round(weight, fitted.codebooks(), widenings)
    best = fitted.rerounded(rounding.codes, rounding.widening)
    for _ in range(refits):
        fitted = fit(rounding.carried, feedback.importance)
        again = feedback.round(weight, fitted.codebooks(), widenings)
        better = again.error < rounding.error
        best = _where_rows(better, fitted.rerounded(again.codes, again.widening), best)
        rounding = _where_rows(better, again, rounding)
    return best


@dataclass(frozen=True)
class Rounding:
    """What one run over the columns ends with."""

    codes: torch.Tensor  # uint8 (rows, cols)
    widening: torch.Tensor  # float32 (rows,), of the row's codebooks
    carried: torch.Tensor  # float32 (rows, cols): the weights as they were rounded, earlier errors carried into them
    error: torch.Tensor  # float64 (rows,): (w - ŵ)(H + damping)(w - ŵ)ᵀ


class Feedback:
    """H (cols, cols), symmetric, PSD, made ready for every weight that meets it.

    Columns are rounded in the order of falling H_jj: what matters most can be made good by most.
    """

    def __init__(self, second_moments: torch.Tensor, damping: float = DAMPING):
        self._order = second_moments.diagonal().argsort(descending=True, stable=True)
        self._factor = inverse_factor(damped(second_moments[self._order][:, self._order].double(), damping))

    @property
    def importance(self) -> torch.Tensor:
        """1 / U_jj² float64 (cols,): what a column's squared error costs, all that follows made good."""
        return self._factor.diagonal().double().square().reciprocal()[self._order.argsort()]

    def round(self, weight: torch.Tensor, codebooks: torch.Tensor, widenings: tuple[float, ...] = (1.0,)) -> Rounding:
        """Round W (rows, cols) to its codebooks (rows, groups, n) times the best of `widenings` for each row."""
        rows, cols = weight.shape
        groups = (self._order // (cols // codebooks.shape[1])).tolist()
        tried = torch.cat([codebooks * widening for widening in widenings])
        carried = weight.to(torch.float32)[:, self._order].T.repeat(1, len(widenings))
        codes, error = self._run(carried, tried, groups)
        best = error.view(len(widenings), rows).argmin(0)
        chosen, original = best * rows + torch.arange(rows), self._order.argsort()
        return Rounding(
            codes.T[chosen][:, original], torch.tensor(widenings)[best], carried.T[chosen][:, original], error[chosen]
        )

    def _run(
        self, carried: torch.Tensor, codebooks: torch.Tensor, groups: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 (cols, rows) and errors float64 (rows,) of Wᵀ (cols, rows); leaves in it what was rounded.

        Turned around, a column and what follows it lie in one piece of memory: three times as fast.
        """
        cols, rows = carried.shape
        factor, codes = self._factor, torch.empty(cols, rows, dtype=torch.uint8)
        total = torch.zeros(rows, dtype=torch.float64)
        ordered, code_of = (each.transpose(0, 1).contiguous() for each in codebooks.sort(dim=2))  # (groups, rows, n)
        middles = (ordered[..., 1:] + ordered[..., :-1]) / 2
        for start in range(0, cols, BLOCK):
            stop = min(start + BLOCK, cols)
            errors = torch.empty(stop - start, rows)
            for column in range(start, stop):
                group, row = groups[column], factor[column, :, None]
                wanted = carried[column]
                place = torch.searchsorted(middles[group], wanted[:, None])
                error = (wanted - ordered[group].gather(1, place)[:, 0]) / row[column]
                carried[column + 1 : stop].addcmul_(row[column + 1 : stop], error, value=-1)
                codes[column] = code_of[group].gather(1, place)[:, 0]
                errors[column - start] = error
            carried[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
            total += errors.double().square().sum(0)
        return codes, total


def conditional_variances(second_moments: torch.Tensor) -> torch.Tensor:
    """What an error in a column adds to e H eᵀ (cols,): `Feedback.importance` without the damping's part.

    In the type of H: float32 is enough to tell rotations apart, and twice as fast.
    """
    unit = float(second_moments.diagonal().mean()) or 1.0  # so that float32 holds the squares of small inputs, too
    second_moments = second_moments / unit
    order = second_moments.diagonal().argsort(descending=True, stable=True).flip(0)
    matrix = damped(second_moments[order][:, order])
    added = float((matrix.diagonal() - second_moments.diagonal()[order]).mean())
    return (torch.linalg.cholesky(matrix).diagonal().square() - added).clamp_min(0)[order.argsort()] * unit


def inverse_factor(matrix: torch.Tensor) -> torch.Tensor:
    """U float32 (cols, cols), upper triangular, Uᵀ U = matrix⁻¹ of a positive definite one; computed in float64.

    From matrix = V Vᵀ with V upper triangular, which is the Cholesky factor of the matrix turned around, U = V⁻¹: half
    the work of inverting the matrix and factoring its inverse.
    """
    turned = torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1)
    unit = torch.eye(len(turned), dtype=torch.float64)
    return torch.linalg.solve_triangular(turned, unit, upper=True).to(torch.float32)


def damped(second_moments: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """H + damping, a copy; the unit matrix for an H of zeros."""
    matrix = second_moments.clone()
    mean = matrix.diagonal().mean()
    matrix.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return matrix


RowWise = TypeVar("RowWise")


def _where_rows(choose: torch.Tensor, one: RowWise, other: RowWise) -> RowWise:
    """A dataclass with the rows of `one` where choose (rows,) holds, else those of `other`."""
    mixed = {}
    for each in fields(one):
        mine, theirs = getattr(one, each.name), getattr(other, each.name)
        if isinstance(mine, torch.Tensor):
            mixed[each.name] = torch.where(choose.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)
    return replace(one, **mixed)
