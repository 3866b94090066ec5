import pytest
import torch
from torch import nn

from lrq_export.calibrate.run import observe
from lrq_export.plan import LayerPlan

INPUTS = {
    "hidden_states": torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([5.0, 900.0, 5.0, 900.0, 5.0, 5.0]),
}


def plan(name, block=0, seed=None):
    return LayerPlan(name, 4, 8, 4, 8, 8, block, seed, "a test")


class Family:
    """Calls the model with its latents, remembering the timesteps of each batch."""

    def __init__(self):
        self.batches = []

    def call(self, model, inputs):
        self.batches.append(inputs["timestep"].tolist())
        return model(inputs["hidden_states"])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def test_every_planned_layer_is_watched_and_no_other():
    net, done = model(), []
    statistics = observe(Family(), net, [plan("0", block=8)], INPUTS, 4, done.append)
    moments, x = statistics.layer("0"), INPUTS["hidden_states"].reshape(-1, 8)
    torch.testing.assert_close(moments.second_moment, x.double().square().mean(0), check_dtype=False)
    assert sum(done) == 6
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_batches_hold_one_timestep_noisiest_first():
    family = Family()
    observe(family, model(), [plan("0")], INPUTS, 3)
    assert family.batches == [[900.0, 900.0], [5.0, 5.0, 5.0], [5.0]]


def test_the_size_of_batches_changes_nothing_that_matters():
    one, all_ = (observe(Family(), model(), [plan("0", 4, 7), plan("1", 8)], INPUTS, batch) for batch in (1, 6))
    for name in ("0", "1"):
        for field in ("second_moment", "rotated_second_moment"):
            torch.testing.assert_close(
                getattr(one.layer(name), field), getattr(all_.layer(name), field), rtol=1e-5, atol=0
            )


def test_rotated_statistics_are_those_of_the_rotated_input():
    from lrq_export.quant.rotation import Rotation

    statistics = observe(Family(), model(), [plan("0", 4, 7)], INPUTS, 6)
    rotated = Rotation(8, 4, 7).apply(INPUTS["hidden_states"].reshape(-1, 8))
    wanted = rotated.double().square().mean(0)
    torch.testing.assert_close(
        statistics.layer("0").rotated_second_moment, wanted, check_dtype=False, rtol=1e-5, atol=0
    )


def test_hooks_are_removed_when_the_model_fails():
    class Failing(Family):
        def call(self, model, inputs):
            raise RuntimeError("no")

    net = model()
    with pytest.raises(RuntimeError, match="no"):
        observe(Failing(), net, [plan("0")], INPUTS, 3)
    assert not any(module._forward_pre_hooks for module in net.modules())
