"""Symmetric INT8 rows."""

import pytest
import torch

from lrq_export.errors import UsageError
from lrq_export.quant import uniform
from lrq_export.quant.weight import QuantizedWeight


def test_eight_bits_keep_a_gaussian_weight_to_one_in_twenty_thousand():
    weight = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))
    quantized = uniform.quantize(weight)
    assert isinstance(quantized, QuantizedWeight)
    assert quantized.codes.dtype == torch.int8
    assert quantized.codes.abs().max() <= 127
    assert (uniform.dequantize(quantized) - weight).square().mean() < 1e-4 * weight.square().mean()


def test_a_row_is_clipped_only_if_that_pays():
    row = torch.cat([torch.linspace(-1, 1, 2000), torch.tensor([1.05])])[None]
    quantized = uniform.quantize(row, bits=2)
    assert quantized.scale < 1.0
    exact = torch.arange(-127, 128).float()[None]
    assert torch.equal(uniform.dequantize(uniform.quantize(exact)), exact)


def test_zero_rows_stay_zero_and_bits_are_checked():
    quantized = uniform.quantize(torch.zeros(2, 8))
    assert (quantized.codes == 0).all()
    assert (quantized.scale == 1).all()
    with pytest.raises(UsageError, match="2 to 8"):
        uniform.quantize(torch.ones(2, 8), bits=16)
