"""Treat the layers that read one input, and stand-ins that compute as the treated layers would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from graphs import names
from lrq_export.comparison.activations import RANGES, Clock, PerToken, PerTokenGroup, Static
from lrq_export.comparison.inputs import LayerInput
from lrq_export.comparison.transforms import Fitted
from lrq_export.comparison.treatments import Treatment
from lrq_export.quant.compensate import GPTQ_DAMPING, Feedback, quantize_compensated
from lrq_export.quant.methods import METHODS
from lrq_export.quant.transforms.base import Transform

QuantizeActivation = Callable[[torch.Tensor], torch.Tensor]


class SimulatedLinear(nn.Module):
    """y = Q(x T) Ŵᵀ + b in float32; the deployed layer's integer products, where there is one, differ by rounding."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, transform: Transform, quantize: QuantizeActivation | None
    ):
        super().__init__()
        self.weight, self.bias, self.transform, self.quantize = weight, bias, transform, quantize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.transform.apply(x.float())
        if self.quantize is not None:
            y = self.quantize(y)
        return nn.functional.linear(y, self.weight, self.bias).to(x.dtype)


@dataclass(frozen=True)
class Treated:
    """The stand-ins for the layers of one input, and what treating them took."""

    layers: dict[str, SimulatedLinear]
    weight_bits: float  # of all weights of these layers, side data and the transform's parameters included
    reason: str  # of the transform


def treat(source: LayerInput, treatment: Treatment, bits: int, act_bits: int, clock: Clock, fitted: Fitted) -> Treated:
    """Transform, quantize and round the layers of one input; deterministic."""
    transform, reason = fitted.transform(source, treatment.transform, bits, act_bits)
    group = _group(source.width, treatment.group)
    tokens = transform.apply(source.tokens)
    quantize = _activation(treatment, tokens, source.token_timesteps, act_bits, group, clock)
    moments = _transformed(source.correlation, transform)
    stored, layers = float(transform.parameters()), {}
    for name, linear, weight in zip(source.layers, source.linears, source.weights, strict=True):
        turned = transform.apply_to_weight(weight)
        rounded = _round(turned, moments, treatment, bits, group)
        layers[name] = SimulatedLinear(rounded, _bias(linear, turned - rounded, source, transform, treatment),
                                       transform, quantize)  # fmt: skip
        per_weight = METHODS[treatment.weights].bits_per_weight(bits, source.width, source.width // group)
        stored += weight.numel() * per_weight
    return Treated(layers, stored, reason)


def _round(weight: torch.Tensor, moments: torch.Tensor, treatment: Treatment, bits: int, group: int) -> torch.Tensor:
    """Ŵ float32 (rows, cols); moments is E[x xᵀ] in the weight's basis."""
    options = {} if group == weight.shape[1] else {"group_size": group}
    fit = partial(METHODS[treatment.weights].quantize, bits=bits, **options)
    if treatment.feedback == "none":
        return fit(weight, moments.diagonal()).dequantize()
    if treatment.feedback == "gptq":
        quantized = fit(weight, moments.diagonal())
        rounding = Feedback(moments, GPTQ_DAMPING).round(weight, quantized.codebooks())
        return quantized.rerounded(rounding.codes, rounding.widening).dequantize()
    return quantize_compensated(weight, moments, fit).dequantize()


def _bias(
    linear: nn.Linear, lost: torch.Tensor, source: LayerInput, transform: Transform, treatment: Treatment
) -> torch.Tensor | None:
    """The layer's bias, moved if the treatment says so by what rounding shifts the mean output by."""
    bias = None if linear.bias is None else linear.bias.detach().float()
    if bias is None or not treatment.bias_correction:
        return bias
    return bias + (lost.double() @ transform.apply(source.mean[None])[0]).float()


def _activation(
    treatment: Treatment, tokens: torch.Tensor, timesteps: torch.Tensor, bits: int, group: int, clock: Clock
) -> QuantizeActivation | None:
    if bits == names.FLOATING_POINT:
        return None
    if treatment.activations == "token":
        return PerToken(bits)
    if treatment.activations == "token_group":
        return PerTokenGroup(bits, group)
    ranges = RANGES if treatment.activations == "timestep_range" else 1
    return Static.fit(tokens, timesteps, bits, ranges, clock)


def _transformed(correlation: torch.Tensor, transform: Transform) -> torch.Tensor:
    """Tᵀ E[x xᵀ] T."""
    return transform.apply(transform.apply(correlation).T.contiguous()).T.contiguous()


def _group(width: int, most: int | None) -> int:
    """The largest divisor of the width that is at most `most`; the whole width for None."""
    return width if most is None else max(d for d in range(1, most + 1) if width % d == 0)
