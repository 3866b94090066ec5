"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): outliers shared out between activations and weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lrq_export.errors import UsageError
from lrq_export.quant.transforms.scaling import ChannelScaling

SMALLEST = 1e-5  # least maximum of a channel, as in SmoothQuant's code: one that is always zero gets a finite factor


def fit_smooth(input_absmax: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float = 0.5) -> ChannelScaling:
    """x / s and W s with s_j = max|X_j|^α / max|W_j|^(1-α), equation 4 of the paper.

    `input_absmax` (width,) is max|X_j| over calibration, `weights` (rows, width) all the linear layers that read X:
    they must share one s. Raises UsageError for other shapes and an α outside 0..1.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"smoothing: got alpha {alpha}, needed 0 (all of it to the activations) to 1 (to the weights)")
    if input_absmax.ndim != 1:
        raise UsageError(f"smoothing: got maxima of shape {tuple(input_absmax.shape)}, needed (width,)")
    salience = weight_absmax(weights, len(input_absmax))
    divisor = input_absmax.double().clamp_min(SMALLEST) ** alpha / salience.clamp_min(SMALLEST) ** (1 - alpha)
    return ChannelScaling(divisor.float())


def weight_absmax(weights: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """max_i |W_ij| over the rows of all weights (rows, width), float64 (width,).

    Raises UsageError for no weights or another width.
    """
    shapes = [tuple(weight.shape) for weight in weights]
    if not shapes or any(len(shape) != 2 or shape[1] != width for shape in shapes):
        raise UsageError(f"weights that share an input: got shapes {shapes}, needed at least one (rows, {width})")
    return torch.stack([weight.detach().abs().amax(0).double() for weight in weights]).amax(0)
