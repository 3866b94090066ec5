"""Channel equalization, ours: the divisors that a Hadamard rotation leaves wanting, in closed form.

A rotation spreads the energy of all channels over all channels, of activations and of weights alike. Rounding then
costs the output in proportion to

    activations:  Σ_j σ_j² / d_j²  ·  Σ_j w_j² d_j²        least at d_j = (σ_j / w_j)^(1/2), by Cauchy and Schwarz
    weights:      Σ_j w_j² d_j²    ·  Π_j d_j^(-2/n)       least at d_j = 1 / w_j, by the means' inequality

where x_j / d_j meets W_j d_j, σ_j is the root mean square of x_j and w_j that of the column W_j. The second line counts
what is left when rounding errors are carried forward: by Cholesky's factor, the geometric mean of what each column can
not make good, in which the input's correlations are one constant. Both optima give the same product whatever exact
scaling of channels the checkpoint came with: outliers that live in scales, not in tokens, vanish.

SmoothQuant (arXiv 2211.10438) has the first form, of maxima, since it does not rotate; cross-layer equalization (Nagel
et al. 2019) that of ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphs.equalizer import encode
from lrq_export.errors import UsageError
from lrq_export.quant.transforms.scaling import ChannelScaling

SHARES = {"activations": (0.5, 0.5), "weights": (0.0, 1.0), "both": (0.25, 0.75)}  # exponents of σ and of 1 / w
SPREAD = 2.0**16  # a channel's σ or w counts as at least the largest by this: silent channels get finite divisors


def fit_equalizer(second_moment: torch.Tensor, weights: Sequence[torch.Tensor], favour: str = "both") -> ChannelScaling:
    """d (width,) with geometric mean 1 from E[x²] (width,) and all weights (rows, width) that read x.

    `favour` names whose rounding errors shall be least: of the activations, of the weights, or `both`, the geometric
    mean of their optima. Raises UsageError for another name, no weights, or other shapes.
    """
    if favour not in SHARES:
        raise UsageError(f"equalizing: got {favour!r}, needed one of {', '.join(SHARES)}")
    shapes = [tuple(weight.shape) for weight in weights]
    if second_moment.ndim != 1 or not shapes or any(shape[1:] != second_moment.shape for shape in shapes):
        raise UsageError(
            f"equalizing: got moments {tuple(second_moment.shape)} and weights {shapes}, "
            "needed (width,) and at least one (rows, width)"
        )
    size_of_x = _bounded(second_moment.double().sqrt())
    size_of_w = _bounded(torch.cat([weight.detach().double() for weight in weights]).square().mean(0).sqrt())
    of_x, of_w = SHARES[favour]
    logarithm = of_x * size_of_x.log() - of_w * size_of_w.log()
    return ChannelScaling((logarithm - logarithm.mean()).exp().float())


def equalizer(second_moment: torch.Tensor, weights: Sequence[torch.Tensor]) -> str:
    """The divisors of `fit_equalizer` as rotations, expressions and records hold them."""
    return encode(fit_equalizer(second_moment, weights).divisor.numpy())


def _bounded(sizes: torch.Tensor) -> torch.Tensor:
    largest = sizes.max()
    return sizes.clamp_min(largest / SPREAD) if largest > 0 else torch.ones_like(sizes)
