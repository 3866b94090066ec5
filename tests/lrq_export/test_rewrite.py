"""Passes that are wrong do not get through: a proof refuses each, and the build stops or goes on without it."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from graphs.expressions import RotateOutput
from graphs.passes import PIPELINE
from graphs.passes.patterns import codes_form, is_lrq, redirect_readers
from graphs.passes.result import PassResult
from lrq_export.errors import CheckFailed
from lrq_export.models import family_of
from lrq_export.proof import Proof
from lrq_export.rewrite import rewrite
from lrq_export.saved_graphs import TRACE, load_graph
from lrq_export.source import open_source
from lrq_export.verify.reference import Reference

BOUND = 1e-6


@pytest.fixture(scope="module")
def trace(package):
    return load_graph(package / TRACE)


@pytest.fixture(scope="module")
def specs(package):
    config = json.loads((package / "manifest.json").read_text())["source"]["config"]
    return family_of(config["_class_name"]).inputs(config)


@pytest.fixture(scope="module")
def proof(package, specs):
    return Proof(specs, Reference.load(package).inputs, read=None)


def fired(change):
    """A pass that does what `change` does to the first node it fits, which returns whether it did."""

    def wrong_pass(traced):
        result = PassResult()
        for node in list(traced.graph.nodes):
            if change(traced, node):
                result.fired = 1
                break
        traced.forget_unused()
        return result

    wrong_pass.__name__ = change.__name__
    return wrong_pass


def drops_a_rotation(traced, node):
    if not is_lrq(node, "HadamardRotate"):
        return False
    redirect_readers(node.outputs[0], node.inputs[0])
    return True


def loses_a_sign(traced, node):
    if not is_lrq(node, "HadamardRotate") or (node.inputs[1].values < 0).all():
        return False
    values = node.inputs[1].values.copy()
    values[0] *= -1
    node.inputs[1] = type(node.inputs[1])("signs.wrong", values)
    return True


def rotates_a_weight_twice(traced, node):
    codes = next((tensor.name for tensor in node.inputs if tensor.name in traced.linears), None)
    if codes is None or traced.linears[codes].weight.shape[0] % 4:
        return False
    traced.rotate_outputs({codes: RotateOutput(4)})
    return True


def misses_a_bias(traced, node):
    if node.op != "Add" or not any(tensor.name in traced.tensors for tensor in node.inputs):
        return False
    (other,) = (tensor for tensor in node.inputs if tensor.name not in traced.tensors)
    redirect_readers(node.outputs[0], other)
    return True


def forgets_the_mask(traced, node):
    """Of text, which no sample of the recording hides."""
    (scores,) = node.inputs if node.op == "Softmax" else (None,)
    if scores is None or scores.inputs[0].op != "Add":
        return False
    node.inputs = [next(each for each in scores.inputs[0].inputs if each.inputs and each.inputs[0].op == "MatMul")]
    return True


def makes_a_gelu_exact(traced, node):
    return node.op == "Gelu" and node.attrs.pop("approximate", "none") == "tanh"


def has_another_epsilon(traced, node):
    if node.op != "LayerNormalization":
        return False
    node.attrs["epsilon"] = 1e-3
    return True


def rounds_tokens_to_half(traced, node):
    if node.op != "LayerNormalization":
        return False
    y, half, back = node.outputs[0], gs.Variable("half", np.float16), gs.Variable("back", np.float32)
    half.shape = back.shape = y.shape
    redirect_readers(y, back)
    traced.graph.nodes += [
        gs.Node("Cast", "to_half", {"to": onnx.TensorProto.FLOAT16}, [y], [half]),
        gs.Node("Cast", "from_half", {"to": onnx.TensorProto.FLOAT}, [half], [back]),
    ]
    return True


def quantizes_in_other_channels(traced, node):
    """The rotation and its inverse in the weight go, and with them what the codes were chosen for."""
    if not is_lrq(node, "HadamardRotate"):
        return False
    matmuls = [reader for reader in node.outputs[0].outputs if reader.op == "MatMul"]
    codes = [matmul.inputs[1].inputs[0].inputs[0].inputs[0].inputs[0].name for matmul in matmuls]
    redirect_readers(node.outputs[0], node.inputs[0])
    for each in codes:
        linear = traced.linears[each]
        traced.linears[each] = replace(linear, weight=replace(linear.weight, maps=()))
    return True


def gives_another_shape(traced, node):
    if not is_lrq(node, "HadamardRotate"):
        return False
    node.outputs[0].shape = [*node.outputs[0].shape[:-1], 7]
    return True


def names_the_output_otherwise(traced, node):
    traced.graph.outputs[0].name = "image"
    return True


def does_not_fit(traced, node):
    codes = next((tensor.name for tensor in node.inputs if tensor.name in traced.linears), None)
    if codes is not None:
        traced.rotate_outputs({codes: RotateOutput(traced.linears[codes].weight.shape[0] + 1)})
    return False


def reads_three_bits(traced, node):
    """Node and table agree, so the graph is whole; in floating point nothing changes."""
    if not is_lrq(node, "TwinLogDequant"):
        return False
    codes = node.inputs[0]
    node.attrs["bits"], traced.linears[codes.name] = 3, replace(traced.linears[codes.name], bits=3)
    codes.dtype, codes.shape = codes_form(node)
    return True


def rounds_activations_to_six_bits(traced, node):
    codes = next((tensor.name for tensor in node.inputs if tensor.name in traced.linears), None)
    if codes is None:
        return False
    traced.linears[codes] = replace(traced.linears[codes], act_bits=6)
    return True


def crashes(traced, node):
    raise IndexError("list index out of range")


WRONG = {
    drops_a_rotation: "NMSE",
    loses_a_sign: "NMSE",
    rotates_a_weight_twice: "NMSE",
    misses_a_bias: "NMSE",
    forgets_the_mask: "NMSE",
    makes_a_gelu_exact: "NMSE",
    has_another_epsilon: "NMSE",
    rounds_tokens_to_half: "NMSE",
    quantizes_in_other_channels: "its input is rotated by None",
    gives_another_shape: "is declared",
    names_the_output_otherwise: "the graph's outputs",
    does_not_fit: "does not divide",
    reads_three_bits: "the integer data of .* integers differ, row",
    rounds_activations_to_six_bits: "the integer data of .*: activations of 6 bits, needed 8",
    crashes: "list index out of range",
}


@pytest.mark.parametrize(("change", "why"), WRONG.items(), ids=[change.__name__ for change in WRONG])
def test_a_wrong_pass_stops_the_build_by_name(trace, proof, change, why):
    before = trace.to_onnx().SerializeToString(deterministic=True)
    with pytest.raises(CheckFailed, match=rf"rewrite: pass {change.__name__}: .*{why}.*--keep-going"):
        rewrite(trace, [fired(change)], proof, BOUND)
    assert trace.to_onnx().SerializeToString(deterministic=True) == before


def test_with_keep_going_the_graph_is_as_if_the_wrong_passes_had_not_run(trace, proof):
    kept = []
    steps = [*map(fired, WRONG), *PIPELINE]
    among = rewrite(trace, steps, proof, BOUND, keep_going=True, done=lambda _, outcome: kept.append(outcome))
    assert among.to_onnx() == rewrite(trace, PIPELINE, proof, BOUND).to_onnx()
    assert [outcome.name for outcome in kept if outcome.refused] == [change.__name__ for change in WRONG]
    assert not any(outcome.result.fired for outcome in kept if outcome.refused)


# No rotation undoes another here, nothing is dead, and rotations rather than mere factors are chosen by shape.
IDLE = {"dead_code", "cancel_rotations", "fold_smoothing"}


def test_what_fired_is_proved_and_what_did_not_is_not(trace, proof):
    outcomes, again = [], []
    once = rewrite(trace, PIPELINE, proof, BOUND, done=lambda _, outcome: outcomes.append(outcome))
    assert [outcome.name for outcome in outcomes] == [step.__name__ for step in PIPELINE]
    assert all(outcome.nmse <= BOUND if outcome.result.fired else outcome.nmse is None for outcome in outcomes)
    assert {outcome.name for outcome in outcomes if not outcome.result.fired} == IDLE
    rewrite(once, PIPELINE, proof, BOUND, done=lambda _, outcome: again.append(outcome))
    assert {(outcome.result.fired, outcome.nmse) for outcome in again} == {(0, None)}


def test_a_pass_that_says_it_did_nothing_has_done_nothing(trace, proof):
    def silent(traced):
        fired(drops_a_rotation)(traced)
        return PassResult()

    assert rewrite(trace, [silent], proof, BOUND).to_onnx() == trace.to_onnx()


def test_a_bound_of_nothing_refuses_even_rounding(trace, proof):
    """The twin of the test above: the proof does measure."""
    with pytest.raises(CheckFailed, match="pass fold_rotation_into"):
        rewrite(trace, PIPELINE, proof, 1e-30)


def test_a_proof_runs_several_sizes_and_is_deterministic(trace, proof):
    answers, again = proof.answers(trace), proof.answers(trace)
    assert len({answer.shape for answer in answers}) == len(answers) == 3
    assert all(np.array_equal(one, other) for one, other in zip(answers, again, strict=True))
    assert all(np.isfinite(answer).all() and answer.std() > 0 for answer in answers)


def test_real_weights_prove_what_random_ones_do(package, trace, specs, tiny):
    real = Proof(specs, Reference.load(package).inputs, open_source(tiny.source).checkpoint.read)
    rewrite(trace, PIPELINE, real, BOUND)
    with pytest.raises(CheckFailed, match="pass loses_a_sign"):
        rewrite(trace, [fired(loses_a_sign)], real, BOUND)
