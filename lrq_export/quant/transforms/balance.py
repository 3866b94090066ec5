"""PTQ4DiT (Wu et al. 2024, arXiv 2405.16005): channel-wise salience balancing, one factor for all timesteps, folded.

b_j = (s_ρ(X_j) / s(W_j))^(1/2) divides x and multiplies W, where s is the largest magnitude of a channel and s_ρ the
mean of s over timesteps, weighted by η_t ~ exp(-ρ_t): a step counts more, the less its salience ranks channels as the
weights' does (Spearman's ρ_t), since there the balance can help most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lrq_export.errors import UsageError
from lrq_export.quant.transforms.scaling import ChannelScaling
from lrq_export.quant.transforms.smooth import fit_smooth, weight_absmax

Rows = slice | torch.Tensor  # which rows of a linear layer make a thing: a slice, or int64 (width,)


def fit_balance(absmax_by_step: torch.Tensor, weights: Sequence[torch.Tensor]) -> ChannelScaling:
    """x / b and W b, from max|X_j| at each timestep (steps, width) and the weights (rows, width) that read X.

    Raises UsageError for other shapes.
    """
    if absmax_by_step.ndim != 2 or not len(absmax_by_step):
        raise UsageError(f"balancing: got maxima of shape {tuple(absmax_by_step.shape)}, needed (steps, width)")
    absmax = absmax_by_step.double()
    salience = weight_absmax(weights, absmax.shape[1])
    correlation = torch.stack([spearman(step, salience) for step in absmax])
    return fit_smooth(correlation.neg().softmax(0) @ absmax, weights, alpha=0.5)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation of a and b (n,), a float64 scalar; 0 if one of them is constant."""
    a, b = (rank - rank.mean() for rank in (average_ranks(a), average_ranks(b)))
    norm = a.norm() * b.norm()
    return a @ b / norm if norm > 0 else norm


def average_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks of values (n,) from 1, float64; equal values share the mean of the ranks they take up."""
    _, position, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[position]


def fold_into_adaln(
    balance: ChannelScaling,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor,
    shift_rows: Rows,
    scale_rows: Rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (rows, cols) and bias (rows,) of an adaLN linear layer whose x (1 + γ) + β comes out divided by b.

    Shift: β rows / b. Scale: (1 + γ) / b - 1, so weight rows / b and bias (1 + bias) / b - 1. Other rows, the gates
    among them, stay. Raises UsageError unless both select `balance.width` rows.
    """
    weight, bias = _copies(linear_weight, linear_bias)
    divisor = balance.divisor.to(weight.dtype)
    for rows in (shift_rows, scale_rows):
        _check_rows(balance, bias[rows])
        weight[rows] /= divisor[:, None]
    bias[shift_rows] /= divisor
    bias[scale_rows] = (1 + bias[scale_rows]) / divisor - 1
    return weight, bias


def fold_into_linear(
    balance: ChannelScaling, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (width, cols) and bias (width,) of a linear layer whose outputs come out divided by b.

    For an attention's output projection that layer is the value projection: attention mixes tokens, not channels.
    Raises UsageError for another number of rows.
    """
    weight, bias = _copies(weight, bias)
    _check_rows(balance, weight)
    divisor = balance.divisor.to(weight.dtype)
    return weight / divisor[:, None], None if bias is None else bias / divisor


def _copies(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both in the type of the computation: float64 if the weight is, otherwise float32."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().to(dtype, copy=True), None if bias is None else bias.detach().to(dtype, copy=True)


def _check_rows(balance: ChannelScaling, rows: torch.Tensor) -> None:
    if len(rows) != balance.width:
        raise UsageError(f"folding a balance: got {len(rows)} rows, needed {balance.width}, one a channel")
