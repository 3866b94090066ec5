import ml_dtypes
import numpy as np
import onnx
import pytest
from graph_texts import ATTENTION

from graphs.checks import GraphError, check, check_preserved
from graphs.passes import bind_plugins, make_linear, merge_projections, retype_codes

TEXT = """
chain (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    a = Linear<rows = 24, cols = 24>(x)
    b = Linear<rows = 24, cols = 24, codebook = 1>(a)
    c = Linear<rows = 24, cols = 24, act_bits = 16>(b)
    d = Linear<rows = 24, cols = 24, bits = 3>(c)
    e = Linear<rows = 24, cols = 24, bits = 2, codebook = 1>(d)
    y = Linear<rows = 24, cols = 24, bits = 8>(e)
}
"""
FOUR_BITS = {"a.codes", "b.codes", "c.codes"}  # c keeps its dequantization: activations in floating point


@pytest.fixture
def traced(parse):
    traced = parse(TEXT)
    make_linear(traced)
    return traced


def types(traced) -> dict[str, str]:
    return {tensor.name: str(np.dtype(tensor.dtype)) for tensor in traced.graph.inputs}


def test_codes_of_four_bits_become_int4_and_all_else_stays(traced, difference):
    before = traced.copy()
    assert retype_codes(traced).fired == 3
    assert types(traced) == types(before) | dict.fromkeys(FOUR_BITS, "int4")
    assert traced.linears == before.linears
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) == 0


def test_open_products_are_retyped_too(parse):
    """Before `make_linear` all nodes are dequantizations."""
    traced = parse(TEXT)
    assert retype_codes(traced).fired == 3
    check(traced)


def test_stacked_codes_are_retyped(parse):
    traced = parse(ATTENTION)
    make_linear(traced)
    merge_projections(traced)
    assert retype_codes(traced).fired == 2
    found = types(traced)
    assert {found["q+k+v.codes"], found["y.codes"]} == {"int4"}
    check(traced)


def test_retyping_again_does_nothing(traced):
    retype_codes(traced)
    before = traced.to_onnx()
    again = retype_codes(traced)
    assert (again.fired, again.skipped) == (0, [])
    assert traced.to_onnx() == before


def test_the_types_survive_a_file_and_later_passes(traced):
    retype_codes(traced)
    saved = type(traced).from_onnx(onnx.ModelProto.FromString(traced.to_onnx().SerializeToString()))
    bind_plugins(saved)
    assert types(saved) == types(traced)
    check(saved)


@pytest.mark.parametrize("wide", [np.uint8, np.int32, ml_dtypes.uint4])
def test_widened_codes_are_left_to_the_checks_and_named(traced, wide):
    codes = next(tensor for tensor in traced.graph.inputs if tensor.name == "a.codes")
    codes.dtype = np.dtype(wide)
    result = retype_codes(traced)
    assert result.fired == 2
    assert result.reasons() == {f"its codes are {np.dtype(wide)}, needed int8 or int4": 1}
    assert codes.dtype == wide
    with pytest.raises(GraphError, match=rf"'a': its codes 'a\.codes' are {np.dtype(wide)}, needed int4"):
        check(traced)


def test_planes_of_bits_as_int4_are_refused(traced):
    """The twin that must fail: a pass that took every code for one of 4 bits."""
    next(tensor for tensor in traced.graph.inputs if tensor.name == "d.codes").dtype = np.dtype(ml_dtypes.int4)
    with pytest.raises(GraphError, match=r"'d': its codes 'd\.codes' are int4, needed int8 as its layout says"):
        check(traced)
