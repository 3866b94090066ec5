import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrq_export.calibrate.statistics import CHUNK_VALUES, Moments, Statistics
from lrq_export.errors import InputError
from lrq_export.package import save_tensors_atomic

LAYER = "blocks.0.to_q"


def _samples(seed, count=12, cols=6):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(cols, generator=generator))
    return torch.randn(count, 5, cols, generator=generator) * scale + 0.1


def _observed(samples, timesteps):
    statistics = Statistics()
    for x, timestep in zip(samples, timesteps, strict=True):
        statistics.observe(LAYER, float(timestep), x)
    return statistics


def _assert_close(one: Moments, two: Moments):
    assert one.tokens == two.tokens
    assert torch.equal(one.channel_absmax, two.channel_absmax)
    torch.testing.assert_close(one.channel_square_sum, two.channel_square_sum, rtol=1e-12, atol=0)
    # Odd powers cancel, so their rounding is relative to the sum of absolute values.
    size = torch.stack([(one.power_sums[1] * one.tokens * one.cols).sqrt(), one.power_sums[1]])
    size = torch.stack([*size, (one.power_sums[1] * one.power_sums[3]).sqrt(), one.power_sums[3]])
    assert bool(((one.power_sums - two.power_sums).abs() <= 1e-12 * size).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=12, max_size=12), st.permutations(range(4)))
def test_any_split_of_the_samples_merges_to_the_same_statistics(seed, parts, order):
    samples, timesteps = _samples(seed), [index % 3 for index in range(12)]
    whole = _observed(samples, timesteps)
    merged = Statistics()
    for part in order:
        chosen = [index for index in range(12) if parts[index] == part]
        merged.merge(_observed(samples[chosen], [timesteps[index] for index in chosen]))
    assert merged.timesteps(LAYER) == whole.timesteps(LAYER) == [0.0, 1.0, 2.0]
    for timestep in whole.timesteps(LAYER):
        _assert_close(merged.at(LAYER, timestep), whole.at(LAYER, timestep))
    _assert_close(merged.layer(LAYER), whole.layer(LAYER))


def test_moments_are_those_of_all_values():
    x = _samples(0)
    values = x.double().numpy().reshape(-1, 6)
    moments = _observed(x, [0] * 12).layer(LAYER)
    assert moments.tokens == 60
    assert moments.absmax == np.float32(np.abs(values).max())
    np.testing.assert_allclose(moments.second_moment, (values**2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.rms, np.linalg.norm(values) / np.sqrt(values.size), rtol=1e-12)
    np.testing.assert_allclose(moments.peak_to_rms, np.abs(values).max() / moments.rms, rtol=1e-6)
    centered = values - values.mean()
    np.testing.assert_allclose(moments.kurtosis, (centered**4).mean() / (centered**2).mean() ** 2, rtol=1e-9)


def test_kurtosis_of_a_gaussian_and_of_a_constant():
    gaussian = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    assert abs(Moments.of(gaussian).kurtosis - 3) < 0.05
    assert Moments.of(torch.full((9, 4), 0.1)).kurtosis == 1.0
    zero = Moments.of(torch.zeros(9, 4))
    assert (zero.kurtosis, zero.rms, zero.peak_to_rms) == (1.0, 0.0, 0.0)


def test_large_inputs_are_summed_in_parts():
    x = torch.randn(CHUNK_VALUES // 64 * 2 + 3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Moments.of(x).channel_square_sum, x.double().square().sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_double(dtype):
    x = torch.full((100_000, 2), 100.0, dtype=dtype)
    moments = Moments.of(x)
    assert moments.channel_square_sum.tolist() == [1e9, 1e9]
    assert moments.channel_absmax.dtype == torch.float32


def test_merging_leaves_the_other_part_as_it_was():
    part, whole = _observed(_samples(1), [0] * 12), Statistics()
    assert whole.merge(part).merge(part) is whole
    assert part.layer(LAYER).tokens == 60
    assert whole.layer(LAYER).tokens == 120
    merged = whole.layer(LAYER)
    merged.merge(merged.copy())
    assert whole.layer(LAYER).tokens == 120


def test_moments_of_different_layers_do_not_merge():
    with pytest.raises(ValueError, match="4 and 6 channels"):
        Moments.of(torch.ones(1, 4)).merge(Moments.of(torch.ones(1, 6)))


def test_a_file_holds_the_same_statistics_bit_for_bit(tmp_path):
    statistics = _observed(_samples(2), [index % 4 for index in range(12)])
    statistics.observe("a.b", 7.5, torch.ones(2, 3, 8))
    statistics.save(tmp_path / "one", {"source": "abc"})
    loaded = Statistics.load(tmp_path / "one")
    assert loaded.layers() == ["a.b", LAYER]
    assert loaded.timesteps("a.b") == [7.5]
    loaded.save(tmp_path / "two", {"source": "abc"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nan_and_infinity_name_the_layer_and_the_timestep():
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(2, 3, 4)
        x[1, 2, 3] = bad
        statistics = Statistics()
        with pytest.raises(InputError, match=f"{LAYER}: got NaN or Inf in its input at timestep 500") as caught:
            statistics.observe(LAYER, 500, x)
        assert caught.value.exit_code == 3
        assert statistics.layers() == []


@pytest.mark.parametrize(
    "change",
    [
        {"a/tokens": None},
        {"a/tokens": torch.zeros(1, dtype=torch.int64)},
        {"a/tokens": torch.ones(2, dtype=torch.int64)},
        {"a/power_sums": torch.zeros(1, 3, dtype=torch.float64)},
        {"a/channel_absmax": torch.zeros(1, 5)},
        {"a/channel_square_sum": torch.zeros(1, 4)},
        {"a/extra": torch.zeros(1)},
        {"a": torch.zeros(1)},
    ],
)
def test_a_file_of_other_content_is_refused(tmp_path, change):
    statistics = Statistics()
    statistics.observe("a", 0, torch.ones(2, 4))
    statistics.save(tmp_path / "stats")
    from safetensors.torch import load_file

    tensors = {**load_file(tmp_path / "stats"), **change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_tensors_atomic(tmp_path / "stats", tensors, {"format": "lrq-export statistics"})
    with pytest.raises(InputError, match="needed lrq-export statistics"):
        Statistics.load(tmp_path / "stats")
    save_tensors_atomic(tmp_path / "stats", {})
    with pytest.raises(InputError, match="got the format None"):
        Statistics.load(tmp_path / "stats")
