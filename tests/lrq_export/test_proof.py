"""What a proof is measured by, apart from the graphs: differences, random weights, inputs of other sizes."""

import numpy as np
import pytest
import torch

from graphs.expressions import Expression
from graphs.traced import LinearWeight, TracedGraph
from lrq_export.models.base import InputSpec
from lrq_export.proof import MARGIN, Proof, difference, other_shapes, random_source

SPECS = {
    "image": InputSpec(("samples", 4, "height", "width"), multiple_of=2),
    "text": InputSpec(("samples", "length", 8), at_most=4),
    "timestep": InputSpec(("samples",)),
    "mask": InputSpec(("samples", "length"), optional=True),
    "places": InputSpec(("samples", "length", 2), between=(0, 64)),
    "absent": InputSpec(("samples", 3), optional=True),
}
RECORDED = {
    "image": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 5,
    "text": torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([7.0, 900.0]),
    "mask": torch.ones(2, 4),
    "places": torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(2)) * 64,
}


def test_the_worst_output_counts():
    before = [np.array([1.0, 1.0]), np.array([2.0, 0.0]), np.array([1.0])]
    after = [np.array([1.0, 1.0]), np.array([2.0, 1.0]), np.array([1.1])]
    assert difference(after, before) == 0.25
    assert difference(before, before) == 0


def test_a_missing_answer_is_no_agreement():
    with pytest.raises(ValueError, match="zip"):
        difference([np.ones(1)], [np.ones(1)] * 2)


@pytest.fixture
def read():
    linears = {"a.codes": LinearWeight("a", Expression("a.weight", (64, 400)), 4, 400, 8)}
    return random_source(TracedGraph(None, linears, {"a_bias": Expression("a.bias", (1000,))}))


def test_random_weights_are_of_the_size_of_a_layers_and_differ_by_name(read):
    """So that every product is about as large as what it multiplies, and no tensor may stand for another."""
    weight, bias = read("a.weight"), read("a.bias")
    assert (weight.shape, bias.shape) == ((64, 400), (1000,))
    assert weight.std().item() == pytest.approx(400**-0.5, rel=0.05)
    assert bias.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(weight, read("a.weight"))
    same_shape = random_source(TracedGraph(None, {}, {name: Expression(name, (64, 400)) for name in ("a.weight", "b")}))
    assert torch.equal(same_shape("a.weight"), weight)
    assert not torch.equal(same_shape("b"), weight)


def test_other_inputs_are_random_numbers_as_large_as_the_recorded_ones():
    made = other_shapes(SPECS, RECORDED, seed=3)
    assert made.keys() == SPECS.keys()
    for name in ("image", "text"):
        assert made[name].std().item() == pytest.approx(RECORDED[name].std().item(), rel=0.25)
    assert set(made["timestep"].tolist()) <= {7.0, 900.0}
    for mask in (made["mask"], made["absent"]):  # not recorded, and masked all the same
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert bool((mask[:, 0] == 1).all())
    assert not torch.equal(made["image"], other_shapes(SPECS, RECORDED, seed=4)["image"])


def test_other_inputs_are_of_other_sizes_that_fit():
    """Half of the pairs of rows and columns and one more for every axis before, and as much text as there may be."""
    made = other_shapes(SPECS, RECORDED, seed=3)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        "image": (3, 4, 10, 12), "text": (3, 4, 8), "timestep": (3,), "mask": (3, 4),
        "places": (3, 4, 2), "absent": (3, 3),
    }  # fmt: skip
    small = other_shapes(SPECS, {"image": torch.randn(1, 4, 2, 2)}, seed=3)
    assert tuple(small["image"].shape) == (3, 4, 4, 4)


def test_a_proof_has_one_recorded_sample_and_two_other_sizes():
    recorded, other, third = Proof(SPECS, RECORDED, read=None).cases
    assert np.array_equal(recorded["image"], RECORDED["image"][:1].numpy())
    assert recorded["timestep"].tolist() == [7.0]
    assert len({case["image"].shape for case in (recorded, other, third)}) == 3
    assert not np.array_equal(other["image"].ravel()[:9], third["image"].ravel()[:9])
    assert [case["absent"].min() for case in (recorded, other, third)] == [1, 0, 0]


class Moving(Proof):
    """Answers its latents, times what the test says."""

    def __init__(self, gain):
        super().__init__(SPECS, RECORDED, read=None)
        self.gain, self.ran = gain, []

    def _run(self, traced, cases):
        self.ran.append(cases)
        return [self.gain * case["image"] + 1 for case in cases]


@pytest.mark.parametrize(("gain", "least"), [(1e-9, 1e-10), (5, 1e-30)])
def test_the_bound_of_a_graph_is_a_multiple_of_its_own_rounding(monkeypatch, gain, least):
    monkeypatch.setattr("lrq_export.proof.LEAST_BOUND", least)
    proof = Moving(gain)
    bound = proof.bound(None, proof.answers(None))
    # Noise of up to a last bit of 1: a third of its square, 5e-15.
    assert bound == least if gain < 1 else MARGIN * 1e-16 < bound < MARGIN * 1e-14
    plain, moved = proof.ran
    for name in SPECS:
        same = all(np.array_equal(one[name], other[name]) for one, other in zip(plain, moved, strict=True))
        assert same == (name not in ("image", "text"))
    assert proof.bound(None, proof.answers(None)) == bound
