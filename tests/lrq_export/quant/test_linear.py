"""QuantizedLinear computes what integer kernels compute."""

import numpy as np
import pytest
import torch

from lrq_export.errors import UsageError
from lrq_export.quant import twin_log, uniform
from lrq_export.quant.linear import QuantizedLinear, exact_ranges
from lrq_export.quant.rotation import Rotation


def reference(x, weight, bias, act_bits):
    """INT32 accumulation, then float32, in numpy."""
    top = 2 ** (act_bits - 1) - 1
    s = np.abs(x).max(-1, keepdims=True) / np.float32(top)
    s[s == 0] = 1
    q = np.clip(np.rint(x / s), -top, top).astype(np.int64)
    acc = q @ weight.integer_weight().numpy().astype(np.int64).T
    return acc.astype(np.float32) * s * weight.scale.numpy() + bias


@pytest.mark.parametrize("act_bits", [8, 6, 4])
@pytest.mark.parametrize("format", ["twin_log", "uniform"])
def test_equals_the_integer_reference_exactly(act_bits, format):
    torch.manual_seed(0)
    dense, bias = torch.randn(24, 4608) * 0.05, torch.randn(24)
    weight = twin_log.quantize(dense, bits=4) if format == "twin_log" else uniform.quantize(dense)
    layer = QuantizedLinear(weight, bias, act_bits=act_bits)
    x = torch.randn(2, 5, 4608)
    x[0, 3] = 0
    y = layer(x)
    np.testing.assert_array_equal(y.numpy(), reference(x.numpy(), weight, bias.numpy(), act_bits))
    weight.integer_weight()  # the twin: one changed integer must show
    layer.weight[11, 100] += 1
    assert not torch.equal(layer(x), y)


def test_sums_beyond_2_to_the_24_are_exact():
    integers = torch.full((2, 4608), 127, dtype=torch.int8)
    integers[1, ::2] = 126
    layer = QuantizedLinear(uniform.Int8Weight(integers, torch.ones(2)), act_bits=8)
    q = torch.full((1, 4608), 127.0)
    q[0, 5] = 126
    exact = q.long() @ integers.long().T
    assert torch.equal(layer._integer_product(q).long(), exact)
    assert len(layer._ranges) > 1
    assert exact.max() > 2**24


@pytest.mark.parametrize("largest", [127, 31])
def test_ranges_cover_all_columns_once_and_stay_exact(largest):
    integers = torch.randint(-127, 128, (16, 4600), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    ranges = exact_ranges(integers, largest)
    assert [i for cols in ranges for i in range(4600)[cols]] == list(range(4600))
    assert all(integers[:, cols].int().abs().sum(1).max() * largest <= 2**24 for cols in ranges)
    assert len(exact_ranges(integers[:, :1152] // 4, 127)) == 1


def test_rotation_leaves_the_result_close_and_sixteen_bits_means_no_activation_rounding():
    torch.manual_seed(0)
    dense, x = torch.randn(32, 288), torch.randn(9, 288)
    x[:, 3] *= 50
    exact = x @ dense.T
    turned = Rotation(288, 72, seed=0)

    def nmse(weight, **options):
        return ((QuantizedLinear(weight, **options)(x) - exact).square().sum() / exact.square().sum()).item()

    rotated = uniform.quantize(turned.apply(dense))
    assert nmse(uniform.quantize(dense), act_bits=16) < 1e-4
    assert nmse(rotated, act_bits=16, rotation=turned) < 1e-4
    assert nmse(rotated, act_bits=6, rotation=turned) < 0.5 * nmse(uniform.quantize(dense), act_bits=6)


def test_the_input_type_is_kept_and_state_is_small():
    layer = QuantizedLinear(uniform.quantize(torch.randn(4, 8)), torch.zeros(4))
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {name: value.dtype for name, value in layer.state_dict().items()} == {
        "weight": torch.int8,
        "scale": torch.float32,
        "bias": torch.float32,
    }


def test_parts_that_do_not_fit_are_refused():
    weight = uniform.quantize(torch.randn(4, 8))
    with pytest.raises(UsageError, match="rotation"):
        QuantizedLinear(weight, rotation=Rotation(16, 16))
    with pytest.raises(UsageError, match="bias"):
        QuantizedLinear(weight, torch.zeros(5))
    with pytest.raises(UsageError, match="activation bits"):
        QuantizedLinear(weight, act_bits=12)
