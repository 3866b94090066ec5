import numpy as np
import onnx_graphsurgeon as gs
import pytest
from graph_texts import ATTENTION

from graphs import names
from graphs.checks import GraphError, check, check_preserved
from graphs.ops import attach_bodies
from graphs.ops.words import words_shape
from graphs.passes import (
    bind_plugins,
    fuse_epilogue,
    make_linear,
    merge_projections,
    prepack,
    retype_codes,
)

TEXT = """
chain (float[batch, tokens, 30] x) => (float[batch, tokens, 30] y)
{
    a = Linear<rows = 24, cols = 30>(x)
    b = Linear<rows = 24, cols = 24, bits = 3, codebook = 1>(a)
    c = Linear<rows = 24, cols = 24, bits = 2>(b)
    d = Linear<rows = 24, cols = 24, bits = 8>(c)
    e = Linear<rows = 30, cols = 24>(d)
    y = Add(x, e)
}
"""
IN_WORDS = {"a": (4, 24, 30), "b": (3, 24, 24), "c": (2, 24, 24), "e": (4, 30, 24)}


def lowered(parse, text):
    traced = parse(text)
    for step in (make_linear, merge_projections, fuse_epilogue, retype_codes, bind_plugins):
        step(traced)
    check(traced)
    return traced


@pytest.fixture
def traced(parse):
    return lowered(parse, TEXT)


def codes(traced, layer):
    return next(tensor for tensor in traced.graph.inputs if tensor.name == f"{layer}.codes")


def node(traced, name):
    return next(node for node in traced.graph.nodes if node.name == name)


def test_every_product_of_codes_reads_words_and_the_function_stays(traced, difference):
    before = traced.copy()
    assert prepack(traced).fired == len(IN_WORDS)
    for layer, sizes in IN_WORDS.items():
        held = codes(traced, layer)
        assert (held.dtype, held.shape) == (np.int8, list(words_shape(*sizes)))
        assert node(traced, layer).attrs["layout"] == names.WORDS
    assert node(traced, "e").op == "TwinLogLinearResidual"
    assert "layout" not in node(traced, "d").attrs
    assert (traced.linears, traced.stacks) == (before.linears, before.stacks)
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) == 0


def test_stacked_rows_are_stacked_words(parse):
    traced = lowered(parse, ATTENTION.replace("rows = 24,", "bits = 3, rows = 24,"))
    assert prepack(traced).fired == 2
    assert codes(traced, "q+k+v").shape == list(words_shape(3, 72, 24))
    check(traced)


def test_prepacking_again_does_nothing(traced):
    prepack(traced)
    before = traced.to_onnx()
    again = prepack(traced)
    assert (again.fired, again.skipped) == (0, [])
    assert traced.to_onnx() == before


def test_words_survive_a_round_trip_and_are_not_retyped(traced):
    prepack(traced)
    saved = type(traced).from_onnx(traced.to_onnx())
    assert retype_codes(saved).fired == 0
    check(saved)
    assert saved.to_onnx() == traced.to_onnx()


def test_a_layer_in_floating_point_keeps_its_codes(parse):
    traced = lowered(parse, TEXT.replace("rows = 24, cols = 30", "act_bits = 16, rows = 24, cols = 30"))
    before = list(codes(traced, "a").shape)
    result = prepack(traced)
    assert result.fired == 3
    assert result.reasons() == {"its activations stay in floating point, and only integer products read words": 1}
    assert codes(traced, "a").shape == before
    check(traced)


def test_codes_that_are_also_read_elsewhere_stay(traced):
    first, copy = node(traced, "a"), gs.Variable("copy", np.float32, ["batch", "tokens", 24])
    traced.graph.nodes.append(gs.Node(first.op, "twin", dict(first.attrs), list(first.inputs), [copy], domain="lrq"))
    result = prepack(traced)
    assert result.fired == 3
    assert result.reasons() == {"its codes are also read elsewhere": 2}
    check(traced)


def test_codes_that_are_no_weight_stay(traced):
    del traced.linears["a.codes"]
    assert prepack(traced).reasons() == {"its codes are in no row of the weight table": 1}


def test_a_graph_of_words_has_no_bodies(traced):
    attach_bodies(traced.to_onnx())
    prepack(traced)
    with pytest.raises(ValueError, match="codes lie in layout 'words'; only a plugin reads that, the body does not"):
        attach_bodies(traced.to_onnx())


# What a wrong pass would leave: each must be refused.
def attribute_forgotten(traced):
    del node(traced, "b").attrs["layout"]


def shape_forgotten(traced):
    codes(traced, "b").shape = [24, 3, 3]


def another_width(traced):
    codes(traced, "c").shape = list(words_shape(4, 24, 24))


def type_forgotten(traced):
    codes(traced, "a").dtype = np.dtype(np.int32)


def unknown_layout(traced):
    node(traced, "a").attrs["layout"] = "tiles"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (attribute_forgotten, "'b': codes has 2 axes, needed 3"),
        (shape_forgotten, "'b': codes has 3 axes, needed 2"),
        (another_width, "'c': axis 1 of codes is 12, needed 8"),
        (type_forgotten, r"'a': its codes 'a\.codes' are int32, needed int8 as its layout says"),
        (unknown_layout, r"layout is 'tiles'; it must be one of \['storage', 'words'\]"),
    ],
)
def test_half_a_prepack_is_refused(traced, wrong, message):
    prepack(traced)
    wrong(traced)
    with pytest.raises(GraphError, match=message):
        check(traced)
