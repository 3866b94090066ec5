"""Twin-Log quantization: how good it is, what it promises, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.ops import twin_log_dequant
from lrq_export.errors import InputError, UsageError
from lrq_export.quant import level_search, twin_log, uniform
from lrq_export.quant.level_sets import valid_sets
from lrq_export.quant.weight import QuantizedWeight

BITS = pytest.mark.parametrize("bits", [2, 3, 4])


def sample(kind: str, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    draw = {"gauss": rng.standard_normal, "laplace": lambda size: rng.laplace(size=size)}
    draw["t4"] = lambda size: rng.standard_t(4, size=size)
    return 0.03 * torch.from_numpy(draw[kind]((rows, cols))).float()


def error(weight, quantized, moment=None) -> float:
    """Relative squared error, weighted by the second moment."""
    moment = torch.ones(weight.shape[1]) if moment is None else moment
    residual = quantized.integer_weight().float() * quantized.scale[:, None] - weight
    return ((residual.double().square() * moment).sum() / (weight.double().square() * moment).sum()).item()


def strongest_uniform_error(weight: torch.Tensor, bits: int) -> float:
    """Symmetric uniform with all 2^bits levels, +-(k + 1/2) s, and the best of 61 clips for every row."""
    peak, top = weight.abs().amax(1, keepdim=True), 2 ** (bits - 1) - 1
    errors = []
    for clip in np.linspace(0.1, 1.0, 61):
        s = peak * clip / (top + 0.5)
        rounded = (torch.floor(weight.abs() / s).clamp(max=top) + 0.5) * s
        errors.append((weight.abs() - rounded).square().sum(1))
    return (torch.stack(errors).amin(0).sum() / weight.square().sum()).item()


@pytest.mark.parametrize(
    ("kind", "bits", "bar"),
    [
        ("gauss", 2, 0.120),
        ("gauss", 3, 0.0345),
        ("gauss", 4, 0.0094),
        ("t4", 3, 0.065),
        ("t4", 4, 0.017),
        ("laplace", 3, 0.053),
        ("laplace", 4, 0.0138),
    ],
)
def test_reaches_the_error_of_a_real_valued_search_and_beats_clipped_uniform(kind, bits, bar):
    weight = sample(kind, 192, 1152)
    found = error(weight, twin_log.quantize(weight, bits=bits))
    assert found <= bar
    assert found < 0.75 * error(weight, uniform.quantize(weight, bits=bits))
    assert found < 0.99 * strongest_uniform_error(weight, bits)


@BITS
def test_groups_lower_the_error(bits):
    weight = sample("t4", 48, 1152)
    whole, grouped = (error(weight, twin_log.quantize(weight, bits=bits, group_size=size)) for size in (None, 64))
    assert grouped < 0.8 * whole


@BITS
@pytest.mark.parametrize("group_size", [None, 24])
def test_codes_are_few_and_decode_as_the_op_decodes_them(bits, group_size):
    weight = sample("laplace", 20, 96)
    quantized = twin_log.quantize(weight, bits=bits, group_size=group_size)
    size, integers = quantized.group_size, twin_log.integer_weight(quantized)
    assert isinstance(quantized, QuantizedWeight)
    assert (quantized.codes.dtype, quantized.exponents.dtype) == (torch.uint8, torch.int8)
    assert (quantized.scale.dtype, integers.dtype) == (torch.float32, torch.int8)
    assert quantized.codes.shape == (20, 96)
    assert quantized.exponents.shape == (20, 96 // size, 2, 3)
    assert quantized.codes.max() < 2**bits
    for row in integers.view(20, -1, size):
        assert all(len(group.unique()) <= 2**bits for group in row)
    twin_log_dequant.validate_exponents(quantized.exponents.numpy(), bits, 4, 6)
    values = twin_log_dequant.table(quantized.exponents.numpy(), bits, 4, 6)
    codes = quantized.codes.numpy().reshape(20, -1, size).astype(np.int64)
    np.testing.assert_array_equal(integers.numpy(), np.take_along_axis(values, codes, 2).reshape(20, 96))
    assert torch.equal(twin_log.dequantize(quantized), integers.float() * quantized.scale[:, None])


@BITS
def test_every_weight_takes_its_nearest_value(bits):
    weight = sample("gauss", 8, 128)
    quantized = twin_log.quantize(weight, bits=bits)
    levels = twin_log.level_table(quantized.exponents, bits).double()[:, 0] * quantized.scale[:, None, None]
    side = (weight < 0).long()
    own = levels.gather(
        1, side[:, :, None].expand(-1, -1, levels.shape[2])
    )  # (rows, cols, levels) of the weight's sign
    nearest = (own - weight.abs()[:, :, None]).abs().amin(2)
    assert torch.allclose((twin_log.dequantize(quantized) - weight).abs().double(), nearest, atol=1e-7)
    assert torch.equal(quantized.codes >> (bits - 1), side.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3])
def test_a_short_row_is_nearly_as_good_as_trying_every_level_set(bits):
    weight = sample("gauss", 2, 48, seed=7)
    best = 0.0
    for row in weight:
        best += min(_exhaustive(row, row.abs().max() * clip / 16 / 127, bits) for clip in twin_log.CLIPS)
    found = error(weight, twin_log.quantize(weight, bits=bits)) * weight.square().sum().item()
    assert found <= 1.12 * best


def _exhaustive(row, scale, bits) -> float:
    """Smallest squared error over all valid level sets, each sign on its own, at a given scale."""
    levels = valid_sets(bits).levels.float() * scale
    sides = row[row >= 0], -row[row < 0]
    return sum((levels[:, :, None] - side).abs_().amin(1).square_().sum(1).amin().item() for side in sides)


def test_the_second_moment_decides_which_weights_matter():
    weight = sample("gauss", 64, 512)
    weight[:, :256] *= 0.1
    moment = torch.cat([torch.full((256,), 100.0), torch.full((256,), 0.1)])
    informed = error(weight, twin_log.quantize(weight, moment, bits=3), moment)
    ignorant = error(weight, twin_log.quantize(weight, bits=3), moment)
    assert informed < 0.3 * ignorant
    blunt = error(weight, uniform.quantize(weight, bits=4), moment)
    assert error(weight, uniform.quantize(weight, moment, bits=4), moment) < 0.7 * blunt


def test_each_group_is_weighted_by_its_own_columns():
    weight = sample("gauss", 32, 256)
    weight[:, :64] *= 0.1
    weight[:, 192:] *= 0.1
    moment = torch.tensor([100.0, 0.1, 0.1, 100.0]).repeat_interleave(64)
    assert error(weight, twin_log.quantize(weight, moment, bits=3, group_size=128), moment) < 0.09  # 0.064 measured


@BITS
def test_the_scale_is_the_weighted_least_squares_one(bits):
    weight = sample("laplace", 64, 512)
    moment = torch.from_numpy(np.random.default_rng(0).lognormal(sigma=2, size=512))
    quantized = twin_log.quantize(weight, moment, bits=bits)
    integers = quantized.integer_weight().double()
    best = (moment * weight * integers).sum(1) / (moment * integers.square()).sum(1)
    assert (best / quantized.scale - 1).abs().mean() < 0.003


@pytest.mark.parametrize("group_size", [None, 48])
def test_the_size_of_row_chunks_does_not_matter(group_size, monkeypatch):
    weight, moment = sample("t4", 37, 144), torch.rand(144)
    whole = twin_log.quantize(weight, moment, bits=3, group_size=group_size)
    monkeypatch.setattr(level_search, "CHUNK_WEIGHTS", 2048)
    pieces = twin_log.quantize(weight, moment, bits=3, group_size=group_size)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.exponents, pieces.exponents)
    assert torch.equal(whole.scale, pieces.scale)


@given(st.integers(-60, 60), st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_scaling_a_weight_by_a_power_of_two_scales_only_the_scale(exponent, seed):
    weight = sample("gauss", 3, 48, seed)
    plain = twin_log.quantize(weight, bits=2)
    scaled = twin_log.quantize(weight * 2.0**exponent, bits=2)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.scale * 2.0**exponent, scaled.scale)


@BITS
@pytest.mark.parametrize("group_size", [None, 16])
def test_zeros_stay_zero(bits, group_size):
    weight = sample("gauss", 4, 64)
    weight[1] = 0
    weight[2] = 1e-42  # subnormal
    weight[3, 16:32] = 0
    quantized = twin_log.quantize(weight, bits=bits, group_size=group_size)
    assert torch.isfinite(quantized.scale).all()
    assert (quantized.scale > 0).all()
    assert (quantized.integer_weight()[1:3] == 0).all()
    if group_size:
        assert (quantized.integer_weight()[3, 16:32] == 0).all()


@pytest.mark.parametrize("cols", [1, 2, 5])
def test_tiny_and_one_sided_rows(cols):
    weight = torch.tensor([[0.5] * cols, [-0.25] * cols])
    assert error(weight, twin_log.quantize(weight, bits=2)) < 1e-9


def test_columns_that_calibration_never_saw_still_round_sensibly():
    weight, moment = sample("gauss", 8, 256), torch.ones(256)
    moment[:128] = 0
    quantized = twin_log.quantize(weight, moment, bits=4)
    assert error(weight[:, :128], uniform.Int8Weight(quantized.integer_weight()[:, :128], quantized.scale)) < 0.03
    silent = twin_log.quantize(weight, torch.zeros(256), bits=4)
    assert torch.equal(silent.codes, twin_log.quantize(weight, bits=4).codes)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantize", [lambda w: twin_log.quantize(w, bits=4), uniform.quantize], ids=["twin", "int8"])
def test_values_that_are_not_finite_are_refused_with_their_place(poison, quantize):
    weight = sample("gauss", 3, 8)
    weight[2, 5] = poison
    with pytest.raises(InputError, match=r"weight\[2, 5\]"):
        quantize(weight)


def test_bad_moments_and_settings_are_refused():
    weight = sample("gauss", 2, 48)
    with pytest.raises(InputError, match="second moment"):
        twin_log.quantize(weight, torch.full((48,), -1.0), bits=4)
    with pytest.raises(UsageError, match=r"\(48,\)"):
        twin_log.quantize(weight, torch.ones(47), bits=4)
    with pytest.raises(UsageError, match="one of 2, 3, 4"):
        twin_log.quantize(weight, bits=5)
    with pytest.raises(UsageError, match="use 16"):
        twin_log.quantize(weight, bits=4, group_size=17)
    with pytest.raises(UsageError, match="rows, cols"):
        twin_log.quantize(weight[0], bits=4)


@pytest.mark.parametrize("bits", [3, 4])
def test_grouped_rows_take_the_clip_that_fits_their_groups_best(monkeypatch, bits):
    """Not the one that looks best in units of its own: a wide clip gains more of its larger units."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 96, generator=generator) * torch.exp(
        torch.randn(40, 4, generator=generator)
    ).repeat_interleave(24, 1)

    def errors() -> torch.Tensor:
        rounded = twin_log.dequantize(twin_log.quantize(weight, bits=bits, group_size=24))
        return (rounded - weight).double().square().sum(1)

    chosen, clips = errors(), twin_log.GROUP_CLIPS
    alone = []
    for clip in clips:
        monkeypatch.setattr(twin_log, "GROUP_CLIPS", (clip,))
        alone.append(errors())
    alone = torch.stack(alone)
    assert (chosen <= alone.amin(0) * 1.1).all()  # the scale is refitted after the choice
    assert chosen.sum() < 1.02 * alone.amin(0).sum()
