"""What `compare` simulates: activations by every granularity, treated layers, and the judge's figures."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.equalizer import encode
from lrq_export.calibrate.run import observe
from lrq_export.comparison import layer, run, transforms
from lrq_export.comparison.activations import Clock, PerToken, PerTokenGroup, Static
from lrq_export.comparison.inputs import LayerInput
from lrq_export.comparison.judge import Judge, accuracy, frechet_distance
from lrq_export.comparison.layer import treat
from lrq_export.comparison.transforms import Fitted
from lrq_export.comparison.treatments import TREATMENTS, treatment_of
from lrq_export.errors import InputError, UsageError
from lrq_export.quant.compensate import DAMPING, GPTQ_DAMPING, Feedback, quantize_compensated
from lrq_export.quant.rotation import Rotation
from lrq_export.quant.transforms.smooth import fit_smooth

WIDTH, ROWS = 24, 16


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.sampled_from([4, 6, 8]), st.floats(-50, 50))
@settings(max_examples=40, deadline=None)
def test_no_value_of_a_token_group_is_off_by_more_than_a_step(seed, bits, offset):
    x = normal(seed, 3, 5, WIDTH) + offset
    parts = x.unflatten(-1, (-1, 8))
    step = (parts.amax(-1) - parts.amin(-1)) / (2**bits - 1)
    error = (PerTokenGroup(bits, 8)(x) - x).unflatten(-1, (-1, 8)).abs().amax(-1)
    assert (error <= step * 1.01 + 1e-5 * abs(offset)).all()


def test_a_token_group_of_one_value_stays_what_it_is():
    x = torch.tensor([[8.0, 8.0, 1.0, 2.0, -3.0, -3.0, 0.0, 0.0]])
    rounded = PerTokenGroup(4, 2)(x)
    torch.testing.assert_close(rounded, x, atol=1e-6, rtol=1e-6)


def test_every_token_has_its_own_scale_and_a_static_scale_none():
    x = torch.stack([normal(0, WIDTH), 100 * normal(1, WIDTH)])
    clock = Clock()
    static = Static.fit(x, torch.zeros(2), 8, 1, clock)
    quiet = [float((each(x)[0] - x[0]).abs().max()) for each in (PerToken(8), static)]
    assert quiet[0] < 0.02 < quiet[1]


def test_ranges_of_timesteps_have_scales_of_their_own():
    tokens = torch.cat([normal(0, 64, WIDTH), 100 * normal(1, 64, WIDTH)])
    timesteps, clock = torch.cat([torch.full((64,), 10.0), torch.full((64,), 900.0)]), Clock()
    ranges = Static.fit(tokens, timesteps, 8, 2, clock)
    clock.timestep = 10.0
    early = float((ranges(tokens[:64]) - tokens[:64]).abs().max())
    clock.timestep = 900.0
    late = float((ranges(tokens[:64]) - tokens[:64]).abs().max())
    assert early < 0.05 < late


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> LayerInput:
    """Two layers that read one input near a few directions, with a loud channel."""

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = torch.nn.Linear(WIDTH, ROWS), torch.nn.Linear(WIDTH, 2 * ROWS)

        def forward(self, x):
            return self.a(x).sum() + self.b(x).sum()

    class Family:
        def call(self, model, part):
            return model(part["hidden_states"])

    x = normal(3, 64, 4, WIDTH // 4) @ normal(4, WIDTH // 4, WIDTH) + 0.2 * normal(5, 64, 4, WIDTH) + 1.0
    x[..., 0] *= 20
    model = Pair()
    samples = {"hidden_states": x, "timestep": torch.arange(64.0) // 16}
    observed = observe(Family(), model, ["a", "b"], samples, 16, tmp_path_factory.mktemp("observed"))
    return LayerInput(("a", "b"), (model.a, model.b), None, observed)


def loss(source: LayerInput, name: str, bits: int = 4, act_bits: int = 8) -> float:
    with torch.no_grad():
        treated = treat(source, treatment_of(name), bits, act_bits, Clock(), Fitted([source]))
        x, total = source.tokens, 0.0
        for layer, linear in zip(source.layers, source.linears, strict=True):
            exact = linear(x)
            total += float((treated.layers[layer](x) - exact).square().sum() / exact.square().sum())
    return total


@pytest.mark.parametrize("name", TREATMENTS)
def test_every_treatment_is_close_at_4_bits(source, name):
    assert loss(source, name, 4, 16 if "static" not in TREATMENTS[name].title else 8) < 0.2


def test_without_rounding_of_activations_a_bias_keeps_the_mean_output(source):
    x = source.observed.tokens("a")
    with torch.no_grad():
        layer = treat(source, treatment_of("tlq_nearest"), 2, 16, Clock(), Fitted([source])).layers["a"]
        plain = treat(source, treatment_of("rtn"), 2, 16, Clock(), Fitted([source])).layers["a"]
        exact = source.linears[0](x).mean(0)
        corrected, shifted = ((each(x).mean(0) - exact).abs().max() for each in (layer, plain))
    assert corrected < 0.02 < shifted


def test_feedback_and_its_fit_lower_the_output_error(source):
    nearest, gptq, ours = (loss(source, name, 3, 16) for name in ("tlq_nearest", "tlq_gptq", "tlq"))
    assert ours < nearest
    assert ours <= gptq * 1.05


@pytest.mark.parametrize(
    ("name", "dampings", "fitted"), [("rtn", [], 0), ("quarot", [GPTQ_DAMPING], 0), ("tlq", [DAMPING], 2)]
)
def test_published_methods_have_gptq_as_published_and_ours_is_fitted(source, monkeypatch, name, dampings, fitted):
    made, calls = [], []

    class Recorded(Feedback):
        def __init__(self, moments, damping=DAMPING):
            made.append(damping)
            super().__init__(moments, damping)

    def compensated(*args):
        calls.append(args)
        return quantize_compensated(*args)

    monkeypatch.setattr(layer, "Feedback", Recorded)
    monkeypatch.setattr(layer, "quantize_compensated", compensated)
    with torch.no_grad():
        treat(source, treatment_of(name), 4, 8, Clock(), Fitted([source]))
    assert (made, len(calls)) == (dampings, fitted)


def test_side_data_is_counted(source, monkeypatch):
    equalized = Rotation(WIDTH, 1, None, encode(np.ones(WIDTH)))
    with torch.no_grad():
        treated = {
            name: treat(source, treatment_of(name), 4, 8, Clock(), Fitted([source])).weight_bits
            for name in ("rtn", "smoothquant", "q_dit")
        }
        monkeypatch.setattr(Fitted, "transform", lambda *_: (equalized, "made up"))
        treated["codebook"] = treat(source, treatment_of("codebook"), 4, 8, Clock(), Fitted([source])).weight_bits
    weights = 3 * ROWS * WIDTH
    assert treated["rtn"] == 4 * weights + 3 * ROWS * 32
    assert treated["smoothquant"] == treated["rtn"] + 16 * WIDTH
    assert treated["q_dit"] == treated["rtn"]  # one group: the width is below 128
    assert treated["codebook"] == 4 * weights + 3 * ROWS * (32 + 8 * 16) + 32 * WIDTH


@pytest.mark.parametrize(("rms", "kind"), [(0.999, "Hadamard"), (1.0, "dual")])
def test_j_decides_between_hadamard_and_dual(source, monkeypatch, rms, kind):
    monkeypatch.setattr(LayerInput, "rms", property(lambda self: rms))
    _, reason = Fitted([source]).transform(source, treatment_of("lrq_dit_text"), 4, 8)
    assert reason.startswith(f"J = {rms:.2f}")
    assert kind in reason


def test_accuracy_and_distance():
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert accuracy(logits, np.array([0, 1, 1])) == pytest.approx(2 / 3)
    features = np.random.default_rng(0).standard_normal((500, 4))
    assert abs(frechet_distance(features, features)) < 1e-9
    assert frechet_distance(features + 2.0, features) == pytest.approx(16.0, rel=1e-6)
    assert frechet_distance(3 * features, features) == pytest.approx(4 * np.trace(np.cov(features.T)), rel=0.02)
    assert np.isnan(frechet_distance(features[:1], features))


def test_the_distance_of_covariances_that_do_not_commute():
    """tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2), the root of a symmetric matrix."""
    rng = np.random.default_rng(1)
    first, second = (rng.standard_normal((300, 5)) @ rng.standard_normal((5, 5)) + shift for shift in (0.0, 1.0))

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    covariances = [np.cov(each.T) for each in (first, second)]
    assert np.abs(covariances[0] @ covariances[1] - covariances[1] @ covariances[0]).max() > 1
    mixed = root(root(covariances[0]) @ covariances[1] @ root(covariances[0]))
    gap = first.mean(0) - second.mean(0)
    wanted = gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * mixed)
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-9)


def test_a_static_scale_clips_what_is_worth_clipping():
    tokens = normal(7, 400, 8)
    tokens[0, 0] = 40.0
    fitted = Static.fit(tokens, torch.zeros(400), 4, 1, Clock())
    tried = [40.0 / 7 * part for part in np.arange(20, 101, 2) / 100]
    errors = [float(((tokens / each).round().clamp(-7, 7) * each - tokens).square().sum()) for each in tried]
    assert fitted.scales == (pytest.approx(tried[int(np.argmin(errors))], rel=1e-6),)
    assert fitted.scales[0] < 0.9 * 40.0 / 7


@pytest.mark.parametrize("name", ["quarot", "tlq_hadamard", "duquant"])
def test_everything_is_fitted_to_the_transformed_input(source, monkeypatch, name):
    """Feedback to the second moments of what the layer really reads, static scales to its tokens."""
    seen = {}
    moments, tokens = layer._feedback, layer._activation
    monkeypatch.setattr(layer, "_feedback", lambda h, *rest: seen.update(h=h) or moments(h, *rest))
    monkeypatch.setattr(layer, "_activation", lambda how, x, *rest: seen.update(x=x) or tokens(how, x, *rest))
    fitted = Fitted([source])
    with torch.no_grad():
        treat(source, treatment_of(name), 4, 8, Clock(), fitted)
    transform, _ = fitted.transform(source, treatment_of(name), 4, 8)
    assert torch.equal(seen["x"], transform.apply(source.tokens))
    assert not torch.allclose(seen["x"], source.tokens, atol=0.1)
    turned = transform.apply(torch.eye(WIDTH, dtype=torch.float64))
    wanted = turned.T @ source.correlation.double() @ turned
    assert (seen["h"] - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_transform_behind_smoothing_is_fitted_to_smoothed_tokens(source, monkeypatch):
    seen, real = [], transforms.fit_dual
    monkeypatch.setattr(transforms, "fit_dual", lambda tokens, **rest: seen.append(tokens) or real(tokens, **rest))
    Fitted([source]).transform(source, treatment_of("duquant"), 4, 8)
    smooth = fit_smooth(source.absmax_by_timestep.amax(0), source.weights)
    assert torch.equal(seen[0], smooth.apply(source.tokens))
    assert not torch.allclose(seen[0], source.tokens, atol=0.1)


def test_a_judge_that_is_not_there_or_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.onnx: no such file"):
        Judge(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(InputError, match="ONNX Runtime cannot load it"):
        Judge(tmp_path / "text.onnx")


def test_image_k_of_a_seed_is_judged_by_row_k_of_the_conditions(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "accuracy", lambda logits, labels: seen.append(labels.tolist()))
    drawn = run.Scores(None, [torch.zeros(3, 1, 2, 2)] * 2)
    bench = SimpleNamespace(
        judge=SimpleNamespace(run=lambda images: (np.eye(len(images), 2), np.zeros((len(images), 2)))),
        exact=drawn, seeds=[4, 9], inputs=SimpleNamespace(conditions={"class_labels": torch.arange(2)}),
        recipe=SimpleNamespace(sampling=SimpleNamespace(images=3)),
    )  # fmt: skip
    run.Bench._judged(bench, drawn)
    assert seen == [[0, 1, 0, 0, 1, 0]]


def test_simulated_layers_are_told_the_timestep(monkeypatch):
    class Model(torch.nn.Module):
        def forward(self, timestep):
            return timestep

    clock = Clock()
    monkeypatch.setattr(run, "Clock", lambda: clock)
    stand_in, _ = run.quantized(Model(), [], treatment_of("tlq_ranges"), 4, 8, Fitted([]))
    stand_in(timestep=torch.tensor([731.0, 731.0]))
    assert clock.timestep == 731.0


def test_methods_share_the_rotation_that_was_chosen_for_their_bits(source, monkeypatch):
    chosen = []
    real = transforms.choose
    monkeypatch.setattr(transforms, "choose", lambda *args: chosen.append(args[4]) or real(*args))
    fitted = Fitted([source])
    for name, bits, act_bits in (("tlq", 4, 8), ("codebook", 4, 8), ("tlq", 4, 6), ("tlq", 3, 8), ("tlq_tensor", 3, 8)):
        fitted.transform(source, treatment_of(name), bits, act_bits)
    assert chosen == [8, 6, 8]
    fitted.transform(source, treatment_of("tlq_not_equalized"), 4, 8)
    assert chosen == [8, 6, 8, 8]


@pytest.mark.parametrize(("name", "drawn"), [("quarot", True), ("duquant", True), ("tlq_hadamard", False)])
def test_another_seed_changes_what_is_drawn_and_nothing_else(source, name, drawn):
    def turned(seed: int) -> torch.Tensor:
        return Fitted([source], seed).transform(source, treatment_of(name), 4, 8)[0].apply(source.tokens)

    assert torch.equal(turned(0), turned(0))
    assert torch.equal(turned(0), turned(1)) != drawn


def test_groups_are_of_the_largest_divisor_and_their_side_data_is_counted(source):
    grouped = replace(treatment_of("tlq_not_rotated"), group=10)  # of 24 columns: three groups of 8
    with torch.no_grad():
        bits = treat(source, grouped, 4, 8, Clock(), Fitted([source])).weight_bits
    assert bits == 4 * 3 * ROWS * WIDTH + 3 * ROWS * (32 + 3 * 48)


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="'quaro'") as caught:
        treatment_of("quaro")
    assert caught.value.hint == "did you mean quarot?"
