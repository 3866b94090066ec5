"""Quantizing one layer: errors it reports, and the bias that keeps its mean output."""

from collections import OrderedDict

import pytest
import torch

from lrq_export.bind import moments_of, quantize_layer
from lrq_export.calibrate.run import observe
from lrq_export.quant.bias_correction import corrected_bias
from lrq_export.quant.rotation import Rotation
from lrq_export.quant.weight import dequantize
from lrq_export.quantized import FOLDED, ONLINE, UNROTATED, LayerRecord

ROWS, COLS = 24, 48


def record(bits: int, group_size: int = COLS) -> LayerRecord:
    return LayerRecord("layer", ROWS, COLS, bits, group_size, 8, 0, None, UNROTATED, "test", [], "layer.bias")


@pytest.fixture
def weight():
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def inputs():
    """Inputs (tokens, cols) with a mean far from zero, as adaLN gives them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(500, COLS, generator=generator) + 3 * torch.randn(COLS, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_corrected_bias_keeps_the_mean_output(weight, inputs, bits):
    layer = quantize_layer(weight, None, record(bits))
    rounded = layer.integer_weight().float() * layer.scale[:, None]
    bias = torch.linspace(-1, 1, ROWS)
    exact = (inputs @ weight.T + bias).mean(0)
    corrected = corrected_bias(bias, weight - dequantize(layer), inputs.double().mean(0))
    torch.testing.assert_close((inputs @ rounded.T + corrected).mean(0), exact, atol=1e-4, rtol=0)


def test_without_the_correction_the_mean_output_moves(weight, inputs):
    layer = quantize_layer(weight, None, record(3))
    rounded = layer.integer_weight().float() * layer.scale[:, None]
    assert ((inputs @ rounded.T).mean(0) - (inputs @ weight.T).mean(0)).abs().max() > 1e-2


def test_the_record_states_the_measured_errors(weight):
    importance = torch.linspace(0.1, 4, COLS, dtype=torch.float64)
    layer = quantize_layer(weight, importance, record(4, group_size=16))
    error = (layer.integer_weight().double() * layer.scale.double()[:, None] - weight.double()).square()
    power = weight.double().square()
    assert layer.record.weight_nmse == pytest.approx(float(error.sum() / power.sum()), rel=1e-5)
    weighted = float((error @ importance).sum() / (power @ importance).sum())
    assert layer.record.weighted_nmse == pytest.approx(weighted, rel=1e-5)
    assert layer.record.weighted_nmse != layer.record.weight_nmse


@pytest.mark.parametrize("correlations", [True, False])
@pytest.mark.parametrize("rotated_by", [UNROTATED, ONLINE, FOLDED])
def test_moments_are_those_of_the_input_that_the_weight_is_rotated_for(inputs, rotated_by, correlations, tmp_path):
    class Family:
        def call(self, model, part):
            return model(part["hidden_states"])

    samples = {"hidden_states": inputs[:, None], "timestep": torch.zeros(len(inputs))}
    model = torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(COLS, ROWS)))
    observed = observe(Family(), model, ["layer"], samples, 64, tmp_path, correlations=correlations)
    rotation = None if rotated_by == UNROTATED else Rotation(COLS, 12, 3)
    seen = inputs if rotation is None else rotation.apply(inputs)
    block, seed = (0, None) if rotation is None else (12, 3)
    layer = LayerRecord("layer", ROWS, COLS, 4, COLS, 8, block, seed, rotated_by, "test", [], "layer.bias")
    mean, second_moment, correlation = moments_of(observed, layer)
    torch.testing.assert_close(mean.float(), seen.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second_moment.float(), seen.square().mean(0), atol=1e-3, rtol=1e-4)
    if correlations:
        torch.testing.assert_close(correlation.float(), seen.T @ seen / len(seen), atol=1e-3, rtol=1e-3)
    else:
        assert correlation is None
