"""`auto`: each input gets the rotation that loses least on its own tokens, and its layers agree on it."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from graphs.equalizer import divisors, encode
from lrq_export.calibrate.observed import Observed
from lrq_export.calibrate.run import observe
from lrq_export.compiler import build
from lrq_export.package import load_manifest
from lrq_export.plan import LayerPlan
from lrq_export.quant import twin_log
from lrq_export.quant.activation import rounded_tokens
from lrq_export.quant.compensate import conditional_variances
from lrq_export.quant.rotation import Rotation
from lrq_export.quant.transforms.base import Identity
from lrq_export.quant.weight import dequantize
from lrq_export.rotations import Candidate, choose, choose_rotations, hadamard_candidates, shared_candidate

WIDTH, ROWS = 192, 40


def tokens(loud: int = 0, seed: int = 0) -> torch.Tensor:
    """Gaussian tokens (256, 192) of which `loud` channels are 60 times as large."""
    x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[:, :loud] *= 60
    return x


def weight(seed: int = 1) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def quantize(matrix: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    return dequantize(twin_log.quantize(matrix, importance, bits=4))


def chosen(x: torch.Tensor, act_bits: int = 8, correlation: torch.Tensor | None = None, weights=None):
    return choose(weights or [weight()], x, correlation, hadamard_candidates(WIDTH, None, 0), act_bits, quantize)


def test_candidates_are_what_a_package_can_hold():
    found = {each.name: each for each in hadamard_candidates(1152, None, 5)}
    assert list(found) == ["none", "block Hadamard", "full Hadamard", "signed Hadamard"]
    assert [found[name].transform.block for name in list(found)[1:]] == [128, 1152, 1152]
    assert found["signed Hadamard"].transform.seed == 5
    assert [each.online for each in found.values()] == [False, True, True, True]
    assert [each.name for each in hadamard_candidates(7, None, 0)] == ["none"]


def test_an_attention_output_is_only_rotated_by_what_folds():
    found = {each.name: each for each in hadamard_candidates(1152, 72, 5, encode(np.full(1152, 2.0)))}
    rotated = ["head Hadamard", "signed head Hadamard"]
    assert list(found) == ["none", *rotated, "equalized", *(f"equalized {name}" for name in rotated)]
    assert [each.transform.block for each in list(found.values())[1:]] == [72, 72, 1, 72, 72]
    assert found["signed head Hadamard"].transform.seed == 5
    assert not any(each.online for each in found.values())
    assert [each.name for each in hadamard_candidates(26, 13, 0)] == ["none"]  # no Hadamard matrix divides 13
    assert shared_candidate(1152, 72).transform == Rotation(1152, 72)


def test_every_rotation_is_also_tried_on_equalized_channels():
    equalizer = encode(np.full(1152, 2.0))
    found = hadamard_candidates(1152, None, 5, equalizer)[4:]
    rotated = ["block Hadamard", "full Hadamard", "signed Hadamard"]
    assert [each.name for each in found] == ["equalized", *(f"equalized {name}" for name in rotated)]
    assert [each.transform.block for each in found] == [1, 128, 1152, 1152]
    assert all(each.transform.equalizer == equalizer for each in found)
    assert all(each.online for each in found)
    assert [each.online for each in hadamard_candidates(7, None, 0, encode(np.ones(7)))] == [False, True]


def test_outliers_are_spread_where_activations_are_rounded():
    loud = chosen(tokens(loud=1), act_bits=4)
    assert loud.losses["full Hadamard"] < 0.5 * loud.losses["none"]
    assert isinstance(loud.chosen.transform, Rotation)
    assert loud.reason.startswith(f"{loud.chosen.name}: output error ")


def test_an_input_without_outliers_is_left_alone():
    assert not chosen(tokens()).chosen.online


def test_a_common_offset_is_not_gathered_into_one_channel():
    """All channels offset alike are, without signs, one huge channel after a full Hadamard rotation."""
    candidates = hadamard_candidates(WIDTH, None, 0)
    found = choose([weight()], tokens() + 20.0, None, candidates, 8, lambda matrix, importance: matrix)
    assert found.losses["signed Hadamard"] < 0.5 * found.losses["full Hadamard"]


def test_losses_are_those_of_rounded_activations_and_of_rounded_weights():
    x, matrix = tokens(loud=2), weight()
    found = chosen(x, act_bits=16)
    rounded = quantize(matrix, x.double().square().mean(0))
    error = ((matrix - rounded).double().square() @ x.double().square().mean(0)).sum()
    power = (x @ matrix.T).square().sum() / len(x)
    assert found.losses["none"] == pytest.approx(float(error / power), rel=1e-5)
    error += ((rounded_tokens(x, 4) - x) @ matrix.T).double().square().sum() / len(x)
    assert chosen(x, act_bits=4).losses["none"] == pytest.approx(float(error / power), rel=1e-5)


def test_work_must_be_earned():
    """Of two candidates that lose the same, the one that folds away is taken; a costly one must lose much less."""
    costly = Candidate("costly", Rotation(WIDTH, WIDTH))
    free = Candidate("free", Rotation(WIDTH, WIDTH), online=False)
    for order in ((costly, free), (free, costly)):
        assert choose([weight()], tokens(), None, order, 8, quantize).chosen.name == "free"
    # For one row the rotation is 28 times the work of the layer, and spreading one loud channel does not earn that.
    pair = [Candidate("none", Identity(WIDTH), online=False), costly]
    for rows, winner in ((1, "none"), (ROWS, "costly")):
        found = choose([weight()[:rows]], tokens(loud=1), None, pair, 4, quantize)
        assert found.losses["costly"] < found.losses["none"]
        assert found.chosen.name == winner


def test_correlated_inputs_count_what_feedback_cannot_make_good():
    x = tokens()
    x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    plain, compensated = chosen(x), chosen(x, correlation=x.T @ x / len(x))
    assert compensated.losses["none"] < plain.losses["none"]


def test_the_correlation_is_taken_into_the_basis_of_the_candidate():
    """One input direction only: rotated, every channel carries it, and all but one error can be made good."""
    x = torch.randn(256, 1, generator=torch.Generator().manual_seed(0)) @ torch.eye(WIDTH)[:1] + 1e-3 * tokens()
    correlation = x.T @ x / len(x)
    found = chosen(x, act_bits=16, correlation=correlation)
    rotation = Rotation(WIDTH, WIDTH)
    turned = rotation.apply(rotation.apply(correlation).T.contiguous()).T.contiguous()
    matrix, importance = rotation.apply(weight()), conditional_variances(turned).double()
    error = float((matrix - quantize(matrix, importance)).double().square().sum(0) @ importance)
    assert found.losses["full Hadamard"] == pytest.approx(
        error / float((x @ weight().T).square().sum() / 256), rel=1e-3
    )


def test_every_layer_of_the_input_counts():
    quiet, loud = weight(), 100 * weight(2)
    alone, both = chosen(tokens(loud=2), weights=[quiet]), chosen(tokens(loud=2), weights=[quiet, loud])
    only_loud = chosen(tokens(loud=2), weights=[loud])
    assert both.losses["none"] == pytest.approx(only_loud.losses["none"], rel=0.1)
    assert both.losses["none"] != pytest.approx(alone.losses["none"], rel=1e-4)


class Attention(torch.nn.Module):
    """Query and key read one tensor with a loud channel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = (torch.nn.Linear(WIDTH, ROWS) for _ in range(2))
        self.out = torch.nn.Linear(ROWS, 8)

    def forward(self, x):
        return self.out(self.query(x) + self.key(x))


@pytest.fixture
def observed(tmp_path) -> tuple[Attention, Observed]:
    class Family:
        def call(self, model, part):
            return model(part["hidden_states"])

    samples = {"hidden_states": tokens(loud=1)[:, None], "timestep": torch.zeros(256)}
    model = Attention()
    return model, observe(Family(), model, ["query", "key", "out"], samples, 64, tmp_path)


def test_layers_of_one_input_are_rotated_alike(observed):
    model, seen = observed
    plans = [
        LayerPlan(name, linear.out_features, linear.in_features, 4, linear.in_features, 4, 0, None, "open")
        for name, linear in model.named_children()
    ]
    done = []
    planned = choose_rotations(
        plans, seen, model.get_parameter, lambda layer: None, lambda layer: False, 3, done.append
    )
    assert [plan.name for plan in planned] == ["query", "key", "out"]
    query, key, _ = planned
    assert query.block
    assert (query.block, query.signs_seed, query.reason) == (key.block, key.signs_seed, key.reason)
    assert done == ["query", "key", "out"]


def test_layers_that_share_an_attention_are_rotated_by_head(observed):
    model, seen = observed
    plans = [
        LayerPlan(name, linear.out_features, linear.in_features, 4, linear.in_features, 4, 0, None, "open")
        for name, linear in model.named_children()
    ]
    *_, out = choose_rotations(plans, seen, model.get_parameter, lambda layer: 8, lambda layer: layer == "out", 3)
    assert (out.name, out.block, out.signs_seed, out.equalizer) == ("out", 8, None, None)
    assert out.reason.startswith("head Hadamard, as all that share an attention: ")


def test_plans_carry_the_seed_and_the_divisors_of_the_input(tmp_path):
    """One channel 4096 times as large, its column as much smaller; an offset, and in each token one outlier."""

    class Family:
        def call(self, model, part):
            return model(part["hidden_states"])

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query = torch.nn.Linear(WIDTH, ROWS)
            self.query.weight.data[:, 7] /= 4096

        def forward(self, x):
            return self.query(x)

    torch.manual_seed(0)
    scaled, model = tokens() + 5.0, Scaled()
    scaled[torch.arange(256), torch.randint(WIDTH, (256,))] += 100
    scaled[:, 7] *= 4096
    samples = {"hidden_states": scaled[:, None], "timestep": torch.zeros(256)}
    seen = observe(Family(), model, ["query"], samples, 64, tmp_path)
    plan = LayerPlan("query", ROWS, WIDTH, 4, WIDTH, 6, 0, None, "open")
    (planned,) = choose_rotations([plan], seen, model.get_parameter, lambda layer: None, lambda layer: False, 3)
    found = divisors(planned.equalizer)
    assert planned.reason.startswith("equalized signed Hadamard: ")
    assert planned.signs_seed == 3
    assert np.log2(found[7] / np.median(found)) == pytest.approx(12, abs=0.5)


ONE_BLOCK = '["adaln_single.*", "caption_projection.*", "proj_out", "transformer_blocks.1.*"]'  # is left to quantize


def automatic(tiny, **changes):
    return tiny.recipe(rotation__kind="auto", keep=ONE_BLOCK, **{"weights__bits": "3"} | changes)


@pytest.fixture(scope="module")
def chosen_by_build(tiny, tmp_path_factory):
    """The result of one undisturbed build at 3 bits."""
    out = tmp_path_factory.mktemp("automatic") / "package"
    return build(tiny.source, out, recipe=automatic(tiny), calibration=tiny.calibration)


def decided(out):
    """The plans of a build that was stopped after calibration."""
    (file,) = out.with_name(f"{out.name}.partial").rglob("plans.json")
    return json.loads(file.read_text())


def test_a_build_chooses_and_says_why(chosen_by_build):
    assert chosen_by_build.passed, chosen_by_build.report["ladder"]
    layers = load_manifest(chosen_by_build.out)["layers"].values()
    assert all(": output error " in layer["reason"] for layer in layers)


def test_a_build_of_int8_weights_chooses_too(tiny, tmp_path):
    out, recipe = tmp_path / "package", automatic(tiny, weights__bits="8")
    build(tiny.source, out, recipe=recipe, calibration=tiny.calibration, until="calibrate")
    assert all(": output error " in plan["reason"] and plan["bits"] == 8 for plan in decided(out))


def test_a_stopped_build_keeps_its_choices(tiny, chosen_by_build, tmp_path, monkeypatch):
    inputs = {"recipe": automatic(tiny), "calibration": tiny.calibration}
    out, whole = tmp_path / "again", chosen_by_build.out
    build(tiny.source, out, **inputs, until="calibrate")
    reasons = {plan["name"]: plan["reason"] for plan in decided(out)}
    assert reasons == {name: layer["reason"] for name, layer in load_manifest(whole)["layers"].items()}
    monkeypatch.setattr("lrq_export.compiler.choose_rotations", None)  # they are not chosen again
    (built,) = build(tiny.source, out, **inputs, until="quantize").out.parent.rglob("quantized.safetensors")
    assert built.read_bytes() == (whole / "quantized.safetensors").read_bytes()


@pytest.fixture
def scaled(tiny, tmp_path):
    """The tiny model with one channel of its text 64 times as large, one of its values 32 times, its output the same.

    Powers of two: the weights are fp16, and stay exact.
    """
    folder = tmp_path / "scaled"
    shutil.copytree(tiny.source, folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.startswith("caption_projection.linear_2."):
            tensor[5] *= 64
        elif name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")):
            tensor[:, 5] /= 64
        elif ".attn1.to_v." in name:
            tensor[7] *= 32
        elif name.endswith(".attn1.to_out.0.weight"):
            tensor[:, 7] /= 32
    save_file(tensors, path)
    return folder


def test_outliers_of_scale_are_equalized_away(tiny, chosen_by_build, scaled, tmp_path):
    result = build(scaled, tmp_path / "package", recipe=automatic(tiny), calibration=tiny.calibration)
    assert result.passed, result.report["ladder"]
    records = load_manifest(tmp_path / "package")["layers"]
    text, value = (records[f"transformer_blocks.0.{name}"] for name in ("attn2.to_k", "attn1.to_out.0"))
    assert text["rotated_by"] == "HadamardRotate"
    assert value["rotated_by"] == "the layer before it"
    for record, channel, factor in ((text, 5, 64), (value, 7, 32)):
        assert record["reason"].startswith("equalized")
        found = divisors(record["equalizer"])
        assert found[channel] > factor / 4 * np.median(found)
    errors = [each.report["ladder"][1]["value"] for each in (chosen_by_build, result)]
    assert errors[1] < 1.5 * errors[0]
