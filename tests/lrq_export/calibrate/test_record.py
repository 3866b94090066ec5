from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lrq_export.calibrate.inputs import load_inputs, spread_rows
from lrq_export.calibrate.record import SpreadRows, call_tensors, record
from lrq_export.checkpoint import TensorFile
from lrq_export.errors import InputError, UsageError
from lrq_export.models.pixart import PixArt

STEPS = (999, 500, 0)


class Denoiser(nn.Module):
    """Takes what diffusers' transformers take: positional, named, nested, scalar, None and flag arguments."""

    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None, added_cond_kwargs=None, **extra):
        return (hidden_states * 0.5,)


class Pipeline:
    """Two rows per call, as under classifier-free guidance; row r of step s of prompt p holds 100 p + s + r/10."""

    def __init__(self, transformer=None, text=lambda prompt: 4):
        self.transformer, self.text = transformer or Denoiser(), text

    def __call__(self, prompts, scale=1.0, timestep=torch.tensor):
        (prompt,) = prompts
        for step, value in enumerate(STEPS):
            latents = torch.tensor([100.0 * prompt + step, 100.0 * prompt + step + 0.1])[:, None, None, None]
            self.transformer(
                latents.expand(2, 1, 2, 2) * scale,
                torch.ones(2, self.text(prompt), 3, dtype=torch.bfloat16),
                timestep=timestep(value),
                added_cond_kwargs={"resolution": torch.ones(2, 2), "aspect_ratio": None},
                guidance=3.5,
                return_dict=False,
                joint_attention_kwargs=None,
            )


def _refused(call, kind, *parts):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_every_tensor_argument_is_kept_by_name(tmp_path):
    pipeline = Pipeline()
    record(pipeline, range(4), tmp_path / "x", samples=100, scale=2.0)
    file = TensorFile(tmp_path / "x")
    assert file.metadata == {
        "format": "lrq-export calibration",
        "steps": "3",
        "rows_seen": "24",
        "transformer": "Denoiser",
    }
    tensors = file.read_all()
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "hidden_states": ((24, 1, 2, 2), torch.float32),
        "encoder_hidden_states": ((24, 4, 3), torch.bfloat16),
        "timestep": ((24,), torch.int64),
        "added_cond_kwargs.resolution": ((24, 2), torch.float32),
        "guidance": ((24,), torch.float32),
    }
    assert tensors["timestep"].tolist() == [value for value in STEPS for _ in range(2)] * 4
    assert tensors["hidden_states"][:3, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 2])
    assert not pipeline.transformer._forward_pre_hooks


def test_rows_are_spread_over_the_whole_run_and_the_same_each_time(tmp_path):
    for name in "ab":
        record(Pipeline(), range(30), tmp_path / name, samples=16)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    kept = TensorFile(tmp_path / "a").read("hidden_states")[:, 0, 0, 0]
    every = torch.tensor([100.0 * p + s + r for p in range(30) for s in range(3) for r in (0, 0.1)])
    torch.testing.assert_close(kept, every[spread_rows(180, 16)])


def test_a_stream_keeps_no_more_rows_than_asked():
    rows = SpreadRows(5)
    for value in range(100):
        rows.add({"x": torch.full((3, 2), float(value))})
        assert len(rows._kept) <= 5
    assert sorted(number for _, number, _ in rows._kept) == spread_rows(300, 5)


@pytest.mark.parametrize(
    "make", [int, float, torch.tensor, lambda v: torch.tensor([v]), lambda v: torch.tensor([v] * 2)]
)
def test_timesteps_come_in_every_form(tmp_path, make):
    record(Pipeline(), [1], tmp_path / "x", timestep=make)
    assert TensorFile(tmp_path / "x").read("timestep").tolist() == [999, 999, 500, 500, 0, 0]


def test_a_transformer_that_is_no_module_is_watched_too(tmp_path):
    class Engine:
        config = SimpleNamespace(in_channels=1)

        def __call__(self, hidden_states, encoder_hidden_states=None, timestep=None, **extra):
            return (hidden_states,)

    engine = Engine()
    pipeline = Pipeline(engine)
    record(pipeline, [1], tmp_path / "x")
    assert pipeline.transformer is engine
    assert set(TensorFile(tmp_path / "x").entries) >= {"hidden_states", "timestep", "added_cond_kwargs.resolution"}


def test_texts_of_different_lengths_are_refused(tmp_path):
    pipeline = Pipeline(text=lambda prompt: 4 + prompt)
    _refused(
        lambda: record(pipeline, [0, 1], tmp_path / "x"),
        InputError,
        "call 4 of the transformer: encoder_hidden_states: got rows of shape (5, 3), needed (4, 3)",
        'padding="max_length"',
    )
    assert not (tmp_path / "x").exists()
    assert not pipeline.transformer._forward_pre_hooks


def test_arguments_that_come_and_go_are_refused():
    rows = SpreadRows(5)
    rows.add({"x": torch.ones(2, 3), "mask": torch.ones(2, 3)})
    _refused(lambda: rows.add({"x": torch.ones(2, 3)}), InputError, "call 2", "got no mask, needed one")
    _refused(
        lambda: rows.add({"x": torch.ones(2, 3).half(), "mask": torch.ones(2, 3)}), InputError, "x: got torch.float16"
    )
    _refused(lambda: rows.add({}), InputError, "got no tensors")


def test_there_must_be_something_to_record(tmp_path):
    _refused(lambda: record(Pipeline(), [], tmp_path / "x"), UsageError, "got 0 prompts")
    _refused(lambda: record(object(), ["a"], tmp_path / "x"), UsageError, "without a .transformer")
    idle = Pipeline()
    idle.__class__ = type("Idle", (Pipeline,), {"__call__": lambda self, prompts: None})
    _refused(lambda: record(idle, ["a"], tmp_path / "x"), UsageError, "never called its transformer")


def test_a_tensor_that_is_not_per_sample_is_left_out_with_a_warning(caplog):
    tensors = call_tensors({"hidden_states": torch.ones(2, 3), "img_ids": torch.ones(7, 3), "flag": True})
    assert list(tensors) == ["hidden_states"]
    assert "img_ids" in caplog.text


def test_a_real_denoiser_under_a_real_scheduler_gives_a_file_that_calibration_takes(tmp_path):
    from diffusers import DDIMScheduler, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, in_channels=1, out_channels=1,
        cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler()

    class Digits:
        def __call__(self, prompts, steps):
            scheduler.set_timesteps(steps)
            latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(prompts[0]))
            for timestep in scheduler.timesteps:
                noise = self.transformer(
                    latents, encoder_hidden_states=torch.ones(1, 3, 8), timestep=timestep[None], return_dict=False
                )[0]
                latents = scheduler.step(noise, timestep, latents).prev_sample

    pipeline = Digits()
    pipeline.transformer = transformer
    record(pipeline, [0, 1], tmp_path / "x", samples=6, steps=5)
    inputs = load_inputs(tmp_path / "x", PixArt().inputs(dict(transformer.config)))
    assert inputs["hidden_states"].shape == (6, 1, 8, 8)
    with torch.no_grad():
        assert PixArt().call(transformer, inputs).shape == (6, 1, 8, 8)
