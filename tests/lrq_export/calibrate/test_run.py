import pytest
import torch
from torch import nn

from lrq_export.calibrate.run import observe
from lrq_export.calibrate.tokens import TokenSample

INPUTS = {
    "hidden_states": torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([5.0, 900.0, 5.0, 900.0, 5.0, 5.0]),
}


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


def test_every_named_layer_is_watched_and_no_other(tmp_path):
    net, done = model(), []
    observed = observe(Family(), net, ["0"], INPUTS, 4, tmp_path, done.append)
    moments, x = observed.statistics.layer("0"), INPUTS["hidden_states"].reshape(-1, 8)
    assert observed.statistics.layers() == ["0"]
    torch.testing.assert_close(moments.second_moment, x.double().square().mean(0), check_dtype=False)
    torch.testing.assert_close(observed.correlation("0"), x.T @ x / len(x))
    assert sum(done) == 6
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_batches_hold_one_timestep_noisiest_first(tmp_path):
    family = Family()
    observe(family, model(), ["0"], INPUTS, 3, tmp_path)
    assert family.batches == [[900.0, 900.0], [5.0, 5.0, 5.0], [5.0]]


def test_the_size_of_batches_changes_nothing_that_matters(tmp_path):
    seen = []
    for batch in (1, 6):
        folder = tmp_path / str(batch)
        folder.mkdir()
        seen.append(observe(Family(), model(), ["0", "1"], INPUTS, batch, folder))
    one, all_ = seen
    for name in ("0", "1"):
        torch.testing.assert_close(one.correlation(name), all_.correlation(name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.tokens(name), all_.tokens(name), rtol=1e-5, atol=1e-6)
        assert torch.equal(one.timesteps(name), all_.timesteps(name))


def test_tokens_come_from_every_sample_with_its_timestep(tmp_path):
    observed = observe(Family(), model(), ["0"], INPUTS, 2, tmp_path)
    assert sorted(observed.timesteps("0").tolist()) == sorted(INPUTS["timestep"].repeat_interleave(3).tolist())
    known = INPUTS["hidden_states"].reshape(-1, 8)
    for token, timestep in zip(observed.tokens("0"), observed.timesteps("0"), strict=True):
        (place,) = (known == token).all(1).nonzero().flatten().tolist()
        assert INPUTS["timestep"][place // 3] == timestep


def test_of_long_inputs_a_few_tokens_are_kept_of_each_sample():
    sample, x = TokenSample(samples=4, most=8), torch.arange(4 * 100 * 2, dtype=torch.float32).view(4, 100, 2)
    sample.observe("layer", 1.0, x)
    (kept,) = sample._rows.values()
    assert [len(rows) for rows in kept] == [2, 2, 2, 2]


class Attention(nn.Module):
    """Query and key read one tensor, value an equal one of its own."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.query(x) + self.key(x) + self.value(x.clone())


def test_layers_that_read_one_tensor_are_found(tmp_path):
    observed = observe(Family(), Attention(), ["query", "key", "value"], INPUTS, 2, tmp_path)
    assert observed.siblings() == [["query", "key"], ["value"]]
    assert torch.equal(observed.correlation("query"), observed.correlation("key"))


@pytest.mark.parametrize("limit", [0, 4 * 64, 2 * 4 * 64])
def test_correlations_beyond_the_limit_take_more_passes_and_are_the_same(tmp_path, limit):
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    torch.manual_seed(0)
    net, layers = Attention(), ["query", "value"]
    whole = observe(Family(), net, layers, INPUTS, 2, tmp_path / "whole")
    family = Family()
    parts = observe(family, net, layers, INPUTS, 2, tmp_path / "parts", limit=limit)
    passes = 1 if limit == 2 * 4 * 64 else 2
    assert len(list((tmp_path / "parts").glob("correlations-*"))) == passes
    assert len(family.batches) == passes * 3
    for layer in layers:
        assert torch.equal(whole.correlation(layer), parts.correlation(layer))


def test_correlations_can_be_left_out(tmp_path):
    observed = observe(Family(), model(), ["0"], INPUTS, 3, tmp_path, correlations=False)
    assert observed.correlation("0") is None


def test_hooks_are_removed_when_the_model_fails(tmp_path):
    class Failing(Family):
        def call(self, model, inputs):
            raise RuntimeError("no")

    net = model()
    with pytest.raises(RuntimeError, match="no"):
        observe(Failing(), net, ["0"], INPUTS, 3, tmp_path)
    assert not any(module._forward_pre_hooks for module in net.modules())
