from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lrq_export.calibrate.inputs import batches, load_inputs, spread_rows, synthetic_inputs
from lrq_export.errors import InputError
from lrq_export.models.base import SAMPLES, InputSpec

SPECS = {
    "hidden_states": InputSpec((SAMPLES, 4, "height", "width"), multiple_of=2),
    "encoder_hidden_states": InputSpec((SAMPLES, "text", 8)),
    "timestep": InputSpec((SAMPLES,)),
    "encoder_attention_mask": InputSpec((SAMPLES, "text"), optional=True),
    "added_cond_kwargs.resolution": InputSpec((SAMPLES, 2)),
    "added_cond_kwargs.aspect_ratio": InputSpec((SAMPLES, 1)),
}


def _recorded(samples=6):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(samples, 4, 6, 4, generator=generator).half(),
        "encoder_hidden_states": torch.randn(samples, 3, 8, generator=generator).bfloat16(),
        "timestep": torch.arange(samples) % 3 * 300,
        "added_cond_kwargs.resolution": torch.full((samples, 2), 1024.0),
        "added_cond_kwargs.aspect_ratio": torch.ones(samples, 1),
    }


def _write(path, **changes):
    tensors = {**_recorded(), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def _refused(path, *parts):
    with pytest.raises(InputError) as caught:
        load_inputs(path, SPECS)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    assert caught.value.hint
    for part in (path.name, *parts):
        assert part in message


def test_recorded_inputs_come_back_as_float32_in_the_models_order(tmp_path):
    mask = torch.tensor([[1, 1, 0]] * 6)
    inputs = load_inputs(_write(tmp_path / "x", encoder_attention_mask=mask), SPECS)
    assert list(inputs) == list(SPECS)
    assert {tensor.dtype for tensor in inputs.values()} == {torch.float32}
    for name, tensor in {**_recorded(), "encoder_attention_mask": mask}.items():
        assert torch.equal(inputs[name], tensor.float())


def test_an_optional_input_may_be_absent_and_rows_may_be_fewer(tmp_path):
    inputs = load_inputs(_write(tmp_path / "x"), SPECS, samples=3)
    assert "encoder_attention_mask" not in inputs
    assert torch.equal(inputs["timestep"], _recorded()["timestep"][spread_rows(6, 3)].float())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hiden_states": torch.ones(6)}, ["got an input hiden_states", "did you mean"]),
        ({"timestep": None, "timesteps": torch.ones(6)}, ["got an input timesteps", "did you mean timestep?"]),
        ({"timestep": None}, ["timestep is missing", "lrq_export.record"]),
        ({"timestep": torch.ones(5)}, ["got shape (5,), needed (samples) with samples = 6 as in hidden_states"]),
        ({"timestep": torch.ones(6, 1)}, ["timestep: got shape (6, 1), needed (samples)"]),
        ({"hidden_states": torch.ones(6, 3, 6, 4)}, ["got shape (6, 3, 6, 4), needed (samples, 4, height, width)"]),
        ({"hidden_states": torch.ones(6, 4, 5, 4)}, ["height, width) with height a positive multiple of 2"]),
        ({"encoder_hidden_states": torch.ones(6, 0, 8)}, ["with text a positive multiple of 1"]),
        ({"encoder_attention_mask": torch.ones(6, 2)}, ["got shape (6, 2)", "text = 3 as in encoder_hidden_states"]),
        ({"timestep": torch.full((6,), float("nan"))}, ["timestep: got 6 NaN or Inf", "[0]"]),
        ({name: tensor[:0].clone() for name, tensor in _recorded().items()}, ["with samples a positive multiple of 1"]),
    ],
)
def test_wrong_inputs_are_one_line_that_names_them(tmp_path, changes, parts):
    _refused(_write(tmp_path / "x", **changes), *parts)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(_write(tmp_path / "y").read_bytes()[:-3])
    _refused(tmp_path / "x", "truncated")
    _refused(tmp_path / "none", "No such file")


def test_synthetic_inputs_cover_the_timesteps_and_depend_on_the_seed_alone():
    make = [synthetic_inputs(SPECS, 40, 20, seed, sizes={"height": 8, "width": 4}) for seed in (0, 0, 1)]
    assert all(torch.equal(make[0][name], make[1][name]) for name in make[0])
    assert not torch.equal(make[0]["hidden_states"], make[2]["hidden_states"])
    assert make[0].keys() == SPECS.keys() - {"encoder_attention_mask"}
    assert make[0]["hidden_states"].shape == (40, 4, 8, 4)
    assert Counter(make[0]["timestep"].tolist()).most_common()[-1][1] == 2
    assert (make[0]["timestep"].max(), make[0]["timestep"].min()) == (999, 0)
    assert torch.equal(make[0]["timestep"], make[0]["timestep"].round())
    assert make[0]["added_cond_kwargs.resolution"].tolist() == [[64, 32]] * 40
    assert make[0]["added_cond_kwargs.aspect_ratio"].tolist() == [[2]] * 40
    assert abs(make[0]["hidden_states"].std() - 1) < 0.05


def test_synthetic_inputs_pass_the_check_of_recorded_ones(tmp_path):
    save_file(synthetic_inputs(SPECS, 5, 2, 0), tmp_path / "x")
    assert load_inputs(tmp_path / "x", SPECS)["timestep"].tolist() == [999, 0, 999, 0, 999]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 7))
def test_batches_hold_every_row_once_and_one_timestep_each(timesteps, batch):
    inputs = {"timestep": torch.tensor(timesteps).float(), "row": torch.arange(len(timesteps))}
    made = list(batches(inputs, batch))
    assert sorted(row for part in made for row in part["row"].tolist()) == list(range(len(timesteps)))
    first = [part["timestep"].unique().tolist() for part in made]
    assert all(len(values) == 1 for values in first)
    assert first == sorted(first, reverse=True)
    assert max(len(part["row"]) for part in made) <= batch


def test_batches_without_a_timestep_follow_the_rows():
    assert [part["x"].tolist() for part in batches({"x": torch.arange(5)}, 2)] == [[0, 1], [2, 3], [4]]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 200))
def test_spread_rows_leave_no_long_gap(total, samples):
    rows = spread_rows(total, samples)
    assert rows == sorted(set(rows))
    assert len(rows) == min(total, samples)
    gaps = [after - before for before, after in zip(rows, [*rows[1:], total], strict=True)]
    assert max(gaps) <= 3 * total / len(rows) + 1


@pytest.mark.parametrize(
    ("prompts", "steps", "halves", "samples"), [(64, 20, 1, 64), (64, 20, 2, 128), (100, 50, 2, 128)]
)
def test_spread_rows_see_every_timestep_and_both_guided_halves(prompts, steps, halves, samples):
    rows = spread_rows(prompts * steps * halves, samples)
    assert len({row // halves % steps for row in rows}) == steps
    assert len({row // halves // steps for row in rows}) >= 0.6 * prompts
    by_half = Counter(row % halves for row in rows)
    assert max(by_half.values()) - min(by_half.values()) <= 4
