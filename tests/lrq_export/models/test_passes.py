"""What the passes make of every family: the same answers, and which rotations are left to compute online."""

import re
from dataclasses import replace

import pytest

from graphs.expressions import RotateOutput
from graphs.online import online_channels, work_by_block
from graphs.passes import PIPELINE
from graphs.passes.patterns import LINEAR_OPS, ROTATE_OPS, is_lrq, operand
from lrq_export.proof import Proof, difference
from lrq_export.trace import trace

BOUND = 1e-6  # NMSE

# Rotations of each block, and how many of them are fused with the norm or activation before them.
ROTATIONS = {
    "PixArt": {"transformer_blocks.0": (4, 3), "transformer_blocks.1": (4, 3)},
    "DiT": {"transformer_blocks.0": (3, 3), "transformer_blocks.1": (3, 3)},
    "FLUX": {"single_transformer_blocks.0": (2, 2), "transformer_blocks.0": (6, 6)},  # three of each stream
    # The first block has a second attention with a norm of its own, the last one nothing for text behind its attention.
    "SD3.5": {"transformer_blocks.0": (7, 7), "transformer_blocks.1": (4, 4)},
    "Wan": {"blocks.0": (4, 4), "blocks.1": (4, 4)},
}
# PixArt's cross-attention reads the stream of the residuals with no norm between.
UNFUSED = {"PixArt": ["transformer_blocks.0.attn2.to_q", "transformer_blocks.1.attn2.to_q"]}
# The layers, but for those that compute values, that have the rotation of what reads them: all text, rotated once.
TEXT = {"PixArt": ["caption_projection.linear_2"], "Wan": ["condition_embedder.text_embedder.linear_2"]}
VALUES = r".*\.(to_v|add_v_proj)"
ATTENDED = r".*\.attn\d?\.(to_out\.0|to_add_out)"  # reads an attention's output and nothing else
SINGLE_OUT = r"single_transformer_blocks\.\d+\.proj_out"  # reads it, 24 channels, with an activation's beside it, 96
CROSS = r".*\.attn2\.to_[kv]"  # of PixArt and Wan alone: a second attention of SD3.5 is one to itself


@pytest.fixture(scope="module", params=list(ROTATIONS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tiny_models):
    return tiny_models[family]


@pytest.fixture(scope="module")
def traced(model, tiny):
    return trace(model.family, model.config, model.plans(tiny.recipe()))


@pytest.fixture(scope="module")
def rewritten(traced):
    after = traced.copy()
    for rewrite in PIPELINE:
        rewrite(after)
    return after


@pytest.fixture(scope="module")
def proof(model):
    return Proof(model.specs, model.inputs(), read=None)


@pytest.fixture(scope="module")
def answers(proof, traced):
    return proof.answers(traced)


@pytest.fixture(scope="module")
def reads(rewritten):
    """Layer -> the tensor that its linear node reads."""
    linears = [node for node in rewritten.graph.nodes if is_lrq(node, *LINEAR_OPS)]
    return {
        weight.layer: node.inputs[0]
        for node in linears
        for weight in rewritten.linear_parts(operand(node, "codes").name)
    }


def folded(traced):
    """The names of the weights and biases that have a rotation of what reads them."""
    weights = {f"{each.layer}.weight": each.weight for each in traced.linears.values()} | traced.tensors
    return {name for name, each in weights.items() if any(isinstance(step, RotateOutput) for step in each.maps)}


def test_it_answers_as_before_at_two_sets_of_sizes(family, proof, answers, rewritten):
    assert {len(case["hidden_states"]) for case in proof.cases} == {1, 3}
    assert proof.cases[0]["hidden_states"].shape[1:] != proof.cases[1]["hidden_states"].shape[1:] or family == "DiT"
    assert difference(proof.answers(rewritten), answers) <= BOUND


def test_a_rotation_folded_into_nothing_would_be_seen(proof, answers, rewritten):
    """Else the test above would show nothing."""
    spoilt = rewritten.copy()
    codes, weight = next((codes, each) for codes, each in spoilt.linears.items() if re.fullmatch(VALUES, each.layer))
    kept = tuple(step for step in weight.weight.maps if not isinstance(step, RotateOutput))
    spoilt.linears[codes] = replace(weight, weight=replace(weight.weight, maps=kept))
    assert difference(proof.answers(spoilt), answers) > 1e-3


def test_rotations_are_left_online_where_no_layer_computes_the_channels(family, model, tiny, reads, rewritten):
    plans = {plan.name: plan for plan in model.plans(tiny.recipe())}
    assert reads.keys() == plans.keys()
    assert all(plan.block > 1 for plan in plans.values())
    for layer, x in reads.items():
        if re.fullmatch(ATTENDED, layer) or (family in TEXT and re.fullmatch(CROSS, layer)):
            wanted = (0, 0)
        elif re.fullmatch(SINGLE_OUT, layer):
            wanted = (24, 120)
        else:
            wanted = (0, plans[layer].cols)
        assert online_channels(x, rewritten) == wanted, layer


def test_the_rotations_of_a_block_are_so_many(family, rewritten):
    left = {block: (work.rotations, work.fused) for block, work in work_by_block(rewritten).items()}
    assert left == ROTATIONS[family]


def test_all_but_pixart_s_query_of_text_are_fused_with_a_norm_or_an_activation(family, rewritten, reads):
    alone = [node.outputs[0] for node in rewritten.graph.nodes if is_lrq(node, "HadamardRotate")]
    assert sorted(layer for layer, x in reads.items() if any(x is each for each in alone)) == UNFUSED.get(family, [])
    assert len(alone) == len(UNFUSED.get(family, []))
    assert any(is_lrq(node, *set(ROTATE_OPS) - {"HadamardRotate"}) for node in rewritten.graph.nodes)


@pytest.mark.parametrize("names", [("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")])
def test_queries_keys_and_values_of_one_input_share_a_rotation(family, reads, names):
    query, key, value = names
    for layer in [layer for layer in reads if layer.endswith(f".{key}")]:
        attention = layer.removesuffix(f".{key}")
        assert reads[layer] is reads[f"{attention}.{value}"]
        crossing = family in TEXT and re.fullmatch(CROSS, layer) is not None
        assert (reads[layer] is reads[f"{attention}.{query}"]) == (not crossing)


def test_values_and_text_have_the_rotation_of_what_reads_them_and_so_do_their_biases(family, rewritten, reads):
    values = [layer for layer in reads if re.fullmatch(VALUES, layer)]
    assert any("add_v_proj" in layer for layer in values) == (family in ("FLUX", "SD3.5"))
    layers = [*values, *TEXT.get(family, [])]
    assert folded(rewritten) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
