import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrq_export.models.base import InputSpec
from lrq_export.proof import other_shapes
from lrq_export.verify import ladder
from lrq_export.verify.metrics import nmse, psnr

NUMBERS = st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=1, max_size=20)


@given(values=NUMBERS, factor=st.floats(0.01, 100))
def test_nmse_is_free_of_scale_and_zero_only_for_equals(values, factor):
    reference = np.array(values)
    assert nmse(reference, reference) == 0
    if reference.any():
        assert nmse(reference * 1.1, reference) == pytest.approx(0.01)
        assert nmse(reference * 1.1 * factor, reference * factor) == pytest.approx(0.01)
        assert nmse(np.zeros_like(reference), reference) == 1


def test_nmse_of_nan_inf_and_a_zero_reference_never_passes():
    assert nmse([1.0, math.nan], [1.0, 1.0]) == math.inf
    assert nmse([math.inf], [1.0]) == math.inf
    assert nmse([1.0], [0.0]) == math.inf
    assert nmse([0.0], [0.0]) == 0
    with pytest.raises(ValueError, match="shapes differ"):
        nmse(np.ones((2, 1)), np.ones((1, 2)))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_reference_that_is_not_finite_never_passes():
    assert not nmse([1.0], [math.nan]) <= 1e-6
    assert not nmse([1.0, 1.0], [math.inf, 1.0]) <= 1e-6


def test_psnr_of_known_errors():
    assert psnr([0.0], [0.2]) == pytest.approx(20.0)  # 10 log10(4 / 0.04)
    assert psnr([0.0], [0.1], peak_to_peak=1.0) == pytest.approx(20.0)
    assert psnr([1.0], [1.0]) == math.inf


@pytest.mark.parametrize(("value", "bound", "passed"), [(1e-7, 1e-6, True), (1e-6, 1e-6, True), (2e-6, 1e-6, False),
                                                        (math.inf, 1e-6, False), (0.5, None, None)])  # fmt: skip
def test_a_rung_passes_at_its_bound(value, bound, passed):
    rung = ladder.at_most("R2", "title", "blame", value, bound)
    assert rung.passed is passed
    assert rung.to_json()["value"] == (value if math.isfinite(value) else None)


def test_a_rung_of_nan_fails():
    assert ladder.at_most("R2", "title", "blame", math.nan, 1e-6).passed is False


SPECS = {
    "hidden_states": InputSpec(("samples", 1, "height", "width"), multiple_of=2),
    "text": InputSpec(("samples", "length", 3)), "timestep": InputSpec(("samples",)),
    "mask": InputSpec(("samples", "length"), optional=True),
}  # fmt: skip


@given(height=st.integers(2, 8), width=st.integers(2, 8), length=st.integers(2, 9), seed=st.integers(0, 5))
def test_other_shapes_fit_the_model_and_are_its_own_timesteps(height, width, length, seed):
    inputs = {
        "hidden_states": torch.randn(4, 1, 2 * height, 2 * width), "text": torch.randn(4, length, 3),
        "timestep": torch.tensor([5.0, 5.0, 900.0, 7.0]), "mask": torch.ones(4, length),
    }  # fmt: skip
    made = other_shapes(SPECS, inputs, seed)
    samples, _, rows, columns = made["hidden_states"].shape
    assert samples == 3
    assert rows % 2 == columns % 2 == 0
    assert made["text"].shape[1] == made["mask"].shape[1]
    assert set(made["timestep"].tolist()) <= {5.0, 900.0, 7.0}
    again = other_shapes(SPECS, inputs, seed)
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_errors_are_split_by_timestep_noisiest_first():
    reference, timesteps = torch.ones(4, 2), torch.tensor([1, 900, 1, 900])
    got = reference.clone()
    got[1] = 2.0
    rows = ladder.noise_error_by_timestep(got, reference, timesteps)
    assert rows == [{"timestep": 900.0, "nmse": 0.5}, {"timestep": 1.0, "nmse": 0.0}]


def test_a_trajectory_is_judged_step_by_step():
    reference = torch.ones(2, 1, 3)
    rows = ladder.trajectory_errors([torch.ones(1, 3), torch.zeros(1, 3)], reference)
    assert rows == [{"step": 1, "nmse": 0.0}, {"step": 2, "nmse": 1.0}]
    with pytest.raises(ValueError, match="zip"):
        ladder.trajectory_errors([torch.ones(1, 3)], reference)


def test_a_reference_that_is_not_finite_is_no_match():
    assert nmse([1.0], [math.nan]) == math.inf
