import pytest

from graphs import names
from graphs.checks import GraphError, check, check_complete
from graphs.passes import bind_plugins, make_linear

TEXT = """
mlp (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    r = Rotate<block = 24>(x)
    u = Linear<rows = 24, cols = 24>(r)
    v = Linear<rows = 24, cols = 24, bits = 8>(u)
    y = Relu(v)
}
"""
ATTRIBUTES = {"plugin_version": names.PLUGIN_VERSION, "plugin_namespace": names.PLUGIN_NAMESPACE}


@pytest.fixture
def traced(parse):
    """As a trace leaves it: lrq nodes without plugin attributes."""
    traced = parse(TEXT)
    make_linear(traced)
    for node in traced.graph.nodes:
        for key in ATTRIBUTES:
            node.attrs.pop(key, None)
    return traced


def test_every_lrq_node_gets_both_attributes_and_no_other_node_does(traced, difference):
    before = traced.copy()
    assert bind_plugins(traced).fired == 3
    for node in traced.graph.nodes:
        has = {key: node.attrs[key] for key in ATTRIBUTES if key in node.attrs}
        assert has == (ATTRIBUTES if node.domain == names.DOMAIN else {})
    check(traced)
    assert difference(before, traced) == 0


def test_binding_again_does_nothing(traced):
    bind_plugins(traced)
    before = traced.to_onnx()
    assert bind_plugins(traced).fired == 0
    assert traced.to_onnx() == before


def test_every_attribute_is_spelled_out(traced):
    linear = next(node for node in traced.graph.nodes if node.op == "TwinLogLinear")
    del linear.attrs["rotation"]
    with pytest.raises(GraphError, match="has no attribute"):
        check_complete(traced)
    bind_plugins(traced)
    assert (linear.attrs["rotation"], linear.attrs["layout"]) == ("none", "storage")
    check_complete(traced)


def test_another_version_is_replaced(traced):
    bind_plugins(traced)
    traced.graph.nodes[0].attrs["plugin_version"] = "0"
    assert bind_plugins(traced).fired == 1
    assert traced.graph.nodes[0].attrs["plugin_version"] == names.PLUGIN_VERSION


def test_an_unknown_op_is_left_alone_and_named(traced):
    traced.graph.nodes[0].op = "HadamardRotat"
    result = bind_plugins(traced)
    assert result.fired == 2
    assert result.reasons() == {"HadamardRotat is not an op of the dialect": 1}
    assert "plugin_version" not in traced.graph.nodes[0].attrs
