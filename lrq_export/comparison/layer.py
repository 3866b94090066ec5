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
from lrq_export.quant.bias_correction import corrected_bias
from lrq_export.quant.compensate import GPTQ_DAMPING, Feedback, quantize_compensated
from lrq_export.quant.methods import METHODS
from lrq_export.quant.transforms.base import Transform, in_basis

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
    transform, reason = fitted.transform(source, treatment, bits, act_bits)
    group = _group(source.width, treatment.group)
    tokens = transform.apply(source.tokens)
    quantize = _activation(treatment, tokens, source.token_timesteps, act_bits, group, clock)
    moments, mean = in_basis(source.correlation.double(), transform), transform.apply(source.mean)
    feedback = _feedback(moments, treatment)
    per_weight = METHODS[treatment.weights].bits_per_weight(bits, source.width, source.width // group)
    stored, layers = float(transform.parameters()), {}
    for name, linear, weight in zip(source.layers, source.linears, source.weights, strict=True):
        turned = transform.apply_to_weight(weight)
        rounded = _round(turned, moments.diagonal(), feedback, treatment, bits, group)
        bias = None if linear.bias is None else linear.bias.detach().float()
        if bias is not None and treatment.bias_correction:
            bias = corrected_bias(bias, turned - rounded, mean)
        layers[name] = SimulatedLinear(rounded, bias, transform, quantize)
        stored += weight.numel() * per_weight
    return Treated(layers, stored, reason)


def _feedback(moments: torch.Tensor, treatment: Treatment) -> Feedback | None:
    """Error feedback under E[x xᵀ] as the treatment has it."""
    if treatment.feedback == "none":
        return None
    return Feedback(moments, GPTQ_DAMPING) if treatment.feedback == "gptq" else Feedback(moments)


def _round(
    weight: torch.Tensor, moment: torch.Tensor, feedback: Feedback | None, treatment: Treatment, bits: int, group: int
) -> torch.Tensor:
    """Ŵ float32 (rows, cols); moment (cols,) is E[x²] in the weight's basis."""
    options = {} if group == weight.shape[1] else {"group_size": group}
    fit = partial(METHODS[treatment.weights].quantize, bits=bits, **options)
    if treatment.feedback == "fitted":
        return quantize_compensated(weight, feedback, fit).dequantize()
    quantized = fit(weight, moment)
    if feedback is not None:
        rounding = feedback.round(weight, quantized.codebooks())
        quantized = quantized.rerounded(rounding.codes, rounding.widening)
    return quantized.dequantize()


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


def _group(width: int, most: int | None) -> int:
    """The largest divisor of the width that is at most `most`; the whole width for None."""
    return width if most is None else max(d for d in range(1, most + 1) if width % d == 0)
