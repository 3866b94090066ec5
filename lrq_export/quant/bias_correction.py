"""Bias correction: what rounding shifts a layer's mean output by goes back into its bias.

Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.2.
"""

import torch


def corrected_bias(bias: torch.Tensor, lost: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """b + (W - Ŵ) E[x] float32 (rows,): the quantized layer's mean output is then the exact one's.

    `lost` is W - Ŵ (rows, cols), `mean` is E[x] (cols,) in the same basis.
    """
    return (bias.double() + lost.double() @ mean.double()).float()
