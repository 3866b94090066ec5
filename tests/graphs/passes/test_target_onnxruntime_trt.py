import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from graphs import names
from graphs.checks import check, check_preserved
from graphs.ops import attach_bodies, lrq_nodes
from graphs.passes import PIPELINE, TARGETS, target_onnxruntime_trt

TEXT = """
mlp (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    r = Rotate<block = 24>(x)
    u = Linear<rows = 24, cols = 24>(r)
    v = Linear<rows = 24, cols = 24, bits = 8>(u)
    y = Relu(v)
}
"""


@pytest.fixture
def traced(parse):
    traced = parse(TEXT)
    for step in PIPELINE:
        step(traced)
    return traced


def domains(model) -> set[str]:
    return {entry.domain for entry in model.opset_import}


def test_every_lrq_node_moves_and_nothing_else_does(traced):
    before = traced.copy()
    assert target_onnxruntime_trt(traced).fired == 3
    for was, node in zip(before.graph.nodes, traced.graph.nodes, strict=True):
        assert node.domain == (names.TRT_PLUGINS if was.domain == names.DOMAIN else was.domain)
        assert (node.op, node.attrs) == (was.op, was.attrs)
    check_preserved(before, traced)


def test_the_model_knows_the_dialect_no_more(traced):
    assert domains(traced.to_onnx()) == {"", names.DOMAIN}
    target_onnxruntime_trt(traced)
    model = traced.to_onnx()
    assert domains(model) == {"", names.TRT_PLUGINS}
    assert {entry.domain: entry.version for entry in model.opset_import}[names.TRT_PLUGINS] == 1
    assert list(lrq_nodes(model.graph.node)) == []
    assert list(attach_bodies(model).functions) == []
    onnx.checker.check_model(model)


def test_moving_again_does_nothing(traced):
    target_onnxruntime_trt(traced)
    before = traced.to_onnx()
    again = target_onnxruntime_trt(traced)
    assert (again.fired, again.skipped) == (0, [])
    assert traced.to_onnx() == before


def test_a_graph_without_lrq_nodes_stays_as_it_is(parse):
    traced = parse("plain (float[batch, 24] x) => (float[batch, 24] y) { y = Kept<rows = 24, cols = 24>(x) }")
    before = traced.to_onnx()
    assert target_onnxruntime_trt(traced).fired == 0
    assert traced.to_onnx() == before


def test_a_node_in_a_subgraph_moves_too(traced):
    rotation = next(node for node in traced.graph.nodes if node.op == "HadamardRotate")
    inner = gs.Variable("inner", np.float32)
    hidden = gs.Node(rotation.op, "hidden", dict(rotation.attrs), list(rotation.inputs), [inner], domain="lrq")
    branch = gs.Graph([hidden], outputs=[inner], opset=names.ONNX_OPSET)
    choice = gs.Variable("z", np.float32, ["batch", "tokens", 24])
    flag, branches = gs.Constant("flag", np.array(True)), {"then_branch": branch, "else_branch": branch}
    traced.graph.nodes.append(gs.Node("If", "choice", branches, [flag], [choice]))
    traced.graph.outputs.append(choice)
    target_onnxruntime_trt(traced)
    model = traced.to_onnx()
    assert list(lrq_nodes(model.graph.node)) == []
    assert domains(model) == {"", names.TRT_PLUGINS}


def test_an_unknown_op_is_left_alone_and_named(traced):
    """No plugin can be there for it; the import that it needs stays."""
    next(node for node in traced.graph.nodes if node.op == "Int8Linear").op = "Int8Liner"
    result = target_onnxruntime_trt(traced)
    assert result.fired == 2
    assert result.reasons() == {"Int8Liner is not an op of the dialect": 1}
    model = traced.to_onnx()
    assert [node.op_type for node in lrq_nodes(model.graph.node)] == ["Int8Liner"]
    assert domains(model) == {"", names.DOMAIN, names.TRT_PLUGINS}


def test_it_is_the_last_of_its_target():
    """What follows would find no lrq node."""
    assert [steps.index(target_onnxruntime_trt) for steps in TARGETS.values() if target_onnxruntime_trt in steps] == [
        len(TARGETS["onnxruntime-trt"]) - 1
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_the_passes_of_every_target_hold_to_the_checks_and_keep_what_users_see(parse, difference, target):
    traced = parse(TEXT)
    for step in PIPELINE:
        step(traced)
    pipeline = traced.copy()
    for step in TARGETS[target]:
        before = traced.copy()
        step(traced)
        check(traced)
        check_preserved(before, traced)
        if step is not target_onnxruntime_trt:  # it leaves nothing that the float model would open
            assert difference(pipeline, traced) == 0
