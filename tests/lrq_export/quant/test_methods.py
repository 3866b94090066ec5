"""The quantizers of the papers: they round as they say, and lose what independent scripts found them to lose."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrq_export.errors import InputError, UsageError
from lrq_export.quant import codebook, twin_log
from lrq_export.quant.codebook_weight import nearest, weighted_error
from lrq_export.quant.methods import METHODS, tlq_released
from lrq_export.quant.methods.log_grid import LogGrid
from lrq_export.quant.weight import QuantizedWeight

ROWS, COLS = 96, 1152
# Relative squared errors of an independent numpy implementation on other rows of the same kind, standard deviation
# 0.03 (Gauss 0.3 where named so): gauss, t4, laplace at 3 and 4 bits.
FOUND = {
    "uniform_minmax": {("gauss", 3): 0.072, ("gauss", 4): 0.016, ("laplace", 4): 0.038},
    "uniform_clip": {("gauss", 3): 0.040, ("gauss", 4): 0.0114, ("laplace", 3): 0.072, ("laplace", 4): 0.025},
    "tlq_released_as_is": {
        ("gauss", 3): 0.211, ("gauss", 4): 0.047, ("wide gauss", 3): 0.038, ("wide gauss", 4): 0.0101,
    },
    "tlq": {("gauss", 3): 0.034, ("gauss", 4): 0.0091, ("laplace", 3): 0.054, ("laplace", 4): 0.014},
}  # fmt: skip


# Their offsets are numbers of their own, or their levels lie on whole multiples of the step.
ABSOLUTE = ("tlq_paper", "tlq_released", "tlq_released_as_is", "shift_uniform_log2")


def sample(kind: str, rows: int = ROWS) -> torch.Tensor:
    rng = np.random.default_rng(0)
    draw = rng.laplace if kind == "laplace" else rng.standard_normal
    values = draw(size=(rows, COLS)) * (0.3 if kind.startswith("wide") else 0.03)
    return torch.from_numpy(values).float()


def relative_error(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((rounded - weight).double().square().sum() / weight.double().square().sum())


@pytest.mark.parametrize(
    ("name", "kind", "bits", "found"),
    [(name, kind, bits, found) for name, rows in FOUND.items() for (kind, bits), found in rows.items()],
)
def test_errors_are_those_that_others_found(name, kind, bits, found):
    weight = sample(kind)
    assert relative_error(weight, METHODS[name].quantize(weight, bits=bits).dequantize()) == pytest.approx(
        found, rel=0.08
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_stay_in_their_table_and_tables_within_their_bits(name, bits):
    weight = sample("gauss", rows=8)
    quantized = METHODS[name].quantize(weight, bits=bits)
    assert quantized.codes.shape == weight.shape
    assert (
        int(quantized.codes.max()) < quantized.values.shape[2] <= 2**bits + (2 if name == "tlq_released_as_is" else 0)
    )
    assert torch.isfinite(quantized.values).all()
    distinct = max(len(row.unique()) for row in quantized.dequantize())
    assert distinct <= quantized.values.shape[2]


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_zeros_one_sign_and_one_value_are_kept_finite(name):
    weight = torch.stack([torch.zeros(64), torch.rand(64) + 0.1, -torch.rand(64) - 0.1, torch.full((64,), 0.25)])
    rounded = METHODS[name].quantize(weight, bits=4).dequantize()
    assert torch.isfinite(rounded).all()
    signs = (rounded[1] >= 0).all(), (rounded[2] <= 0).all()
    assert all(signs)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bits", [0, 9])
def test_bits_that_no_byte_holds_are_refused(name, bits):
    with pytest.raises(UsageError, match=f"bits: got {bits}, needed"):
        METHODS[name].quantize(sample("gauss", rows=2), bits=bits)


@pytest.mark.parametrize("name", METHODS)
def test_bad_weights_are_refused(name):
    weight = sample("gauss", rows=2)
    weight[1, 5] = torch.nan
    with pytest.raises(InputError, match=r"weight\[1, 5\]: got nan"):
        METHODS[name].quantize(weight, bits=4)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ABSOLUTE])
def test_units_do_not_matter(name):
    weight = sample("gauss", rows=6)
    once, scaled = (METHODS[name].quantize(w, bits=3).dequantize() for w in (weight, 8 * weight))
    assert torch.allclose(8 * once, scaled, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("uniform_minmax",)])
def test_important_columns_are_rounded_better(name):
    weight = sample("laplace", rows=32)
    moment = torch.full((COLS,), 1e-4)
    moment[: COLS // 8] = 1.0
    plain, weighed = (METHODS[name].quantize(weight, h, bits=3).dequantize() for h in (None, moment))
    plain, weighed = (weighted_error(weight, each, moment).sum() for each in (plain, weighed))
    # The released code's percentiles of such small weights are all one: there is nothing to choose.
    assert weighed <= plain if name.startswith("tlq_released") else weighed < plain


def test_uniform_minmax_ignores_importance():
    weight = sample("laplace", rows=4)
    first, second = (METHODS["uniform_minmax"].quantize(weight, h, bits=3) for h in (None, torch.rand(COLS)))
    assert torch.equal(first.codes, second.codes)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12),
    step=st.floats(0.125, 2, width=32),
    zero=st.integers(-8, 3),
    count=st.integers(2, 8),
    offset=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_a_log_grid_rounds_to_the_nearest_logarithm(weights, step, zero, count, offset):
    weight = torch.tensor([weights])
    grid = LogGrid(torch.full((1, 2), step), torch.full((1, 2), float(zero)), offset)
    quantized = grid.round(weight, count)
    for value, code in zip(weights, quantized.codes[0].tolist(), strict=True):
        assert (code >= count) == (value < 0)
        logs = step * (zero + np.arange(count))
        wanted = np.log2(max(abs(value) + offset, np.finfo(np.float32).tiny))
        assert abs(logs[code % count] - wanted) <= np.abs(logs - wanted).min() + 1e-4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_nearest_is_nearest(seed, count):
    generator = torch.Generator().manual_seed(seed)
    weight, values = torch.randn(3, 20, generator=generator), torch.randn(3, count, generator=generator)
    rounded = nearest(weight, values).dequantize()
    assert torch.equal((rounded - weight).abs(), (weight[..., None] - values[:, None]).abs().amin(2))


def test_the_released_grid_is_anchored_at_one_for_small_weights():
    """All percentiles of the filled-up logarithms are 0: one row's largest level says nothing of its largest weight."""
    quantized = tlq_released.quantize(sample("gauss", rows=8), bits=3)
    larger = tlq_released.quantize(torch.cat([sample("gauss", rows=7), 0.5 * sample("gauss", rows=1)]), bits=3)
    assert torch.allclose(quantized.values[:7], larger.values[:7])
    weight = torch.cat([sample("gauss", rows=8), torch.full((8, 300), 3.0)], dim=1)  # a fifth beyond 1: not anchored
    assert not torch.allclose(tlq_released.quantize(weight, bits=3).values, quantized.values, atol=0.1)


def test_released_codes_beyond_the_bits_are_an_exact_zero_and_one_more_negative_level():
    weight = sample("wide gauss", rows=4)
    weight[:, ::7] = 0
    kept, released = (tlq_released.quantize(weight, bits=3, exact_codes=exact) for exact in (True, False))
    assert (released.dequantize()[weight == 0] == 0).all()
    assert not (kept.dequantize()[weight == 0] == 0).all()
    assert relative_error(weight, released.dequantize()) < relative_error(weight, kept.dequantize())


@pytest.mark.parametrize("kind", ["gauss", "laplace"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 128])
def test_a_free_codebook_is_no_worse_than_twin_log(kind, bits, group_size):
    weight = sample(kind, rows=24)
    free, ours = (each.quantize(weight, bits=bits, group_size=group_size) for each in (codebook, twin_log))
    assert isinstance(free, QuantizedWeight)
    rounded = free.integer_weight().float() * free.scale[:, None]
    assert relative_error(weight, rounded) <= 1.003 * relative_error(weight, twin_log.dequantize(ours))
    assert free.table.shape == (24, COLS // (group_size or COLS), 2**bits)


def test_lloyd_never_raises_the_error():
    weight, importance = sample("laplace", rows=16), torch.rand(16, COLS)
    start = torch.randn(16, 8) * 0.03
    before, after = (
        weighted_error(weight, nearest(weight, values).dequantize(), importance)
        for values in (start, codebook.lloyd(weight, importance, start))
    )
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.9 * before.sum()


def test_impossible_codebooks_are_refused():
    with pytest.raises(UsageError, match="codebook bits: got 9, needed 1 to 8"):
        codebook.quantize(sample("gauss", rows=2), bits=9)
    with pytest.raises(UsageError, match="group size: got 100, needed a divisor of the 1152 columns"):
        codebook.quantize(sample("gauss", rows=2), bits=3, group_size=100)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "tlq_released_as_is"])
def test_a_row_of_zeros_stays_one(method, bits):
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    rounded = METHODS[method].quantize(weight, bits=bits).dequantize()
    assert rounded[1].abs().max() < 1e-6
    assert rounded[0].abs().max() > 0.1
