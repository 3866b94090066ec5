"""What holds of the traced graph of every family that attends jointly or with rotary positions."""

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from graphs import names
from graphs.checks import check
from lrq_export.engine.attention import match_attention
from lrq_export.proof import Proof
from lrq_export.recipe import select_layers
from lrq_export.trace import trace
from lrq_export.verify.metrics import nmse

FOREIGN = re.compile(
    "If|Loop|Scan|BitShift|Bitwise.*|Sequence.*|SplitToSequence|NonZero"
)  # TensorRT imports none of them


@pytest.fixture(scope="module")
def plans(each, tiny):
    return each.plans(tiny.recipe())


@pytest.fixture(scope="module")
def traced(each, plans):
    return trace(each.family, each.config, plans)


@pytest.fixture(scope="module")
def weights(each):
    return {name: tensor.float() for name, tensor in each.new().state_dict().items()}


def answers_and_torch_s(each, traced, weights):
    """The float model of the graph on a recorded sample and on inputs of other sizes, and diffusers' model on both."""
    proof, model = Proof(each.specs, each.inputs(), weights.__getitem__), each.new()
    cases = [{name: torch.from_numpy(array) for name, array in case.items()} for case in proof.cases]
    assert [len(case["hidden_states"]) for case in cases] == [1, 3, 3]
    assert cases[0]["hidden_states"].shape[2:] != cases[1]["hidden_states"].shape[2:] or "tokens" in each.sizes
    return proof.answers(traced), [each.family.call(model, case) for case in cases]


def test_every_planned_layer_is_one_linear_of_a_checked_graph(traced, plans):
    check(traced)
    assert sorted(weight.layer for weight in traced.linears.values()) == sorted(plan.name for plan in plans)
    held = [node for node in traced.graph.nodes if node.op == "TwinLogDequant"]
    assert len(held) == len(plans) == len({node.inputs[0].name for node in held})


def test_the_graph_computes_what_the_model_does_at_two_sets_of_sizes(each, traced, weights):
    for got, wanted in zip(*answers_and_torch_s(each, traced, weights), strict=True):
        assert got.shape == wanted.shape
        # Sines of up to 1000 radians, which tell the timestep, are good to 1e-4 in float32. At timestep 0 it is 1e-12.
        assert nmse(got, wanted) < 1e-8


def test_another_weight_would_be_seen(each, traced, weights, plans):
    """Else the test above would show nothing."""
    name = next(f"{plan.name}.weight" for plan in plans if plan.name.endswith("to_v"))
    spoilt = weights | {name: weights[name] * 1.05}
    assert all(nmse(got, was) > 1e-6 for got, was in zip(*answers_and_torch_s(each, traced, spoilt), strict=True))


def test_every_weight_is_the_checkpoint_s_and_nothing_else_is_an_input(each, traced, weights):
    sources = {expression.source for expression in traced.tensors.values()}
    sources |= {weight.weight.source for weight in traced.linears.values()}
    assert sources == weights.keys()
    assert [tensor.name for tensor in traced.model_inputs()] == list(each.specs)


def test_all_free_dimensions_are_dynamic_and_keep_their_names(each, traced):
    for tensor in traced.model_inputs():
        for got, needed in zip(tensor.shape, each.specs[tensor.name].shape, strict=True):
            if isinstance(needed, int):
                assert got == needed
            else:
                assert re.sub(r"^\d+\*|_units$", "", got) == needed


def test_every_attention_is_one_that_the_engine_fuses(traced):
    attentions = [match_attention(node, traced.graph) for node in traced.graph.nodes if node.op == "Softmax"]
    assert attentions
    assert {(found.heads, round(found.scale**-2)) for found in attentions} == {(2, 12)}


def test_tensorrt_can_import_every_node(traced):
    model = traced.to_onnx()
    assert [node.op_type for node in model.graph.node if FOREIGN.fullmatch(node.op_type)] == []
    assert {node.domain for node in model.graph.node} == {"", names.DOMAIN}
    wide = {TensorProto.DOUBLE, TensorProto.COMPLEX64, TensorProto.COMPLEX128}
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    assert not wide & {value.type.tensor_type.elem_type for value in values}
    constants = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert {array.dtype for array in constants} <= {np.dtype(np.float32), np.dtype(np.int64)}
    assert all(array.size <= 256 for array in constants)  # numbers and rotations; no table that depends on a size
    made = {name for node in model.graph.node for name in node.output}
    assert not [node.name for node in model.graph.node if node.op_type == "Split" and {*node.input[1:]} & made]


def test_every_keep_pattern_has_a_layer(each):
    model = each.family.construct(each.settings)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for pattern in each.family.keep:
        assert select_layers(linears, [pattern])[1]
