"""The integers of every layer stay through all passes, and a pass that would change one is told so."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from graph_texts import ATTENTION, edited

from graphs.checks import GraphError
from graphs.integer_data import FORMAT_OF, check_same_integers, integer_layers
from graphs.ops import words
from graphs.passes import PIPELINE, TARGETS, make_linear, prepack
from graphs.passes.patterns import DEQUANT_OPS, LINEAR_OPS, codes_form, is_lrq

FORMATS = {
    "4 bits": "", "3 bits": ", bits = 3", "2 bits": ", bits = 2", "8 bits": ", bits = 8",
    "4 bits, table": ", codebook = 1", "3 bits, table": ", bits = 3, codebook = 1",
    "activations of 6 bits": ", act_bits = 6",
    "activations in floating point": ", act_bits = 16",
}  # fmt: skip


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def traced(request, parse):
    return parse(ATTENTION.replace("rows = 24", f"rows = 24{request.param}"))


def test_every_op_that_reads_codes_has_a_format():
    assert FORMAT_OF.keys() == {*DEQUANT_OPS, *LINEAR_OPS}


def test_the_integers_stay_through_the_pipeline_and_what_plugin_targets_run_after_it(traced):
    before = integer_layers(traced)
    assert before.keys() == {"q", "k", "v", "y"}
    assert all(len(np.unique(layer.weight)) > 3 for layer in before.values())
    for step in (*PIPELINE, *TARGETS["tensorrt"]):
        step(traced)
        after = integer_layers(traced)
        assert after.keys() == before.keys()
        check_same_integers(before, after)


def test_layers_differ_from_each_other(traced):
    """Else one layer's integers could stand in another's place."""
    weights = [layer.weight for layer in integer_layers(traced).values()]
    assert not any(np.array_equal(one, other) for place, one in enumerate(weights) for other in weights[:place])


def test_columns_that_end_within_a_byte_are_decoded(parse):
    traced = parse(ATTENTION.replace("24", "15").replace("2, 12}", "3, 5}"))
    before = integer_layers(traced)
    for step in PIPELINE:
        step(traced)
    check_same_integers(before, integer_layers(traced))


def through(traced, *steps):
    for step in steps:
        step(traced)
    return traced


def fewer_bits(traced):
    for node in traced.graph.nodes:
        if is_lrq(node, "TwinLogDequant"):
            codes = node.inputs[0]
            node.attrs["bits"], traced.linears[codes.name] = 3, replace(traced.linears[codes.name], bits=3)
            codes.dtype, codes.shape = codes_form(node)


def smaller_groups(traced):
    for node in traced.graph.nodes:
        if is_lrq(node, "TwinLogDequant"):
            name = node.inputs[0].name
            node.attrs["group_size"], traced.linears[name] = 12, replace(traced.linears[name], group_size=12)
            node.inputs[1].shape = [24, 2, 2, 3]


def another_fraction(traced):
    for node in traced.graph.nodes:
        if is_lrq(node, "TwinLogDequant"):
            node.attrs["fraction_bits"] = 5


def coarser_activations(traced):
    for name, weight in traced.linears.items():
        traced.linears[name] = replace(weight, act_bits=6)


def floating_activations(traced):
    """The product after the tokens were quantized becomes one that leaves them as they are."""
    for node in [node for node in traced.graph.nodes if is_lrq(node, "TwinLogLinear")]:
        x, *packed, bias = node.inputs
        attributes = {key: value for key, value in node.attrs.items() if key not in ("act_bits", "rotation", "block")}
        weight, transposed, product = (gs.Variable(f"{node.name}_{part}") for part in ("w", "wt", "open"))
        traced.graph.nodes += [
            gs.Node("TwinLogDequant", f"{node.name}_dequant", attributes, packed, [weight], node.domain),
            gs.Node("Transpose", f"{node.name}_turn", {"perm": [1, 0]}, [weight], [transposed]),
            gs.Node("MatMul", f"{node.name}_matmul", {}, [x, transposed], [product]),
        ]
        node.op, node.domain, node.attrs, node.inputs = "Add", None, {}, [product, bias]


def renamed_layer(traced):
    for name, weight in traced.linears.items():
        traced.linears[name] = replace(weight, layer=f"{weight.layer}_copy")


WRONG = {
    fewer_bits: r"the integer data of q: \d+ of 96 integers differ, row 0 column \d+ is",
    smaller_groups: "of 96 integers differ",
    another_fraction: "give levels .*, needed step >= 0",  # most exponents mean nothing then
    coarser_activations: "of q: activations of 6 bits, needed 8",
    renamed_layer: "of q_copy: there was no such layer",
}


@pytest.mark.parametrize(("wrong", "found"), WRONG.items(), ids=[wrong.__name__ for wrong in WRONG])
def test_what_changes_them_is_found(parse, wrong, found):
    traced = parse(ATTENTION)
    before = integer_layers(traced)
    wrong(traced)
    with pytest.raises(ValueError, match=found):
        check_same_integers(before, integer_layers(traced))


def test_activations_that_are_no_longer_quantized_are_found(parse):
    """In floating point, where the proof runs, both are one function."""
    traced = through(parse(ATTENTION), make_linear)
    before = integer_layers(traced)
    floating_activations(traced)
    with pytest.raises(GraphError, match="of q: its activations are left in floating point"):
        check_same_integers(before, integer_layers(traced))
    check_same_integers(integer_layers(parse(ATTENTION)), before)  # the other way round is what make_linear does


def test_codes_in_elements_that_do_not_hold_them_are_found(parse):
    """A byte has four codes of two bits, an INT4 two."""
    traced = parse(ATTENTION.replace("rows = 24", "rows = 24, bits = 2"))
    before = integer_layers(traced)
    for name in traced.codes_inputs():
        traced.graph.tensors()[name].dtype = np.dtype(ml_dtypes.int4)
    with pytest.raises(GraphError, match="of 96 integers differ"):
        check_same_integers(before, integer_layers(traced))


def test_words_in_another_order_are_found(parse, monkeypatch):
    """Codes 2 i and 2 i + 1 swapped where a pass lays them out, but not where a node reads them."""
    traced = parse(ATTENTION)
    before = integer_layers(traced)
    prepack(through(traced, *PIPELINE))
    unit = words.UNITS[4]
    monkeypatch.setitem(
        words.UNITS, 4, replace(unit, join=lambda codes: unit.join(codes)[..., [1, 0, 3, 2, 5, 4, 7, 6]])
    )
    with pytest.raises(GraphError, match=r"of y: \d+ of 96 integers differ, row 0 column"):
        check_same_integers(before, integer_layers(traced))


def test_a_node_that_reads_a_layer_otherwise_is_refused(parse):
    traced = parse(edited(ATTENTION, ("(float[batch, tokens, 24] y)", "(float[batch, tokens, 24] y, float[24, 24] w)"),
                          ("q4 =", "w = Abs(q_w) q4 =")))  # fmt: skip
    (dequant,) = [node for node in traced.graph.nodes if node.outputs and node.outputs[0].name == "q_w"]
    twin = dequant.copy(inputs=list(dequant.inputs), outputs=[])
    twin.attrs = dict(dequant.attrs) | {"integer_bits": 1}  # mantissas of one bit, rounded otherwise
    traced.graph.nodes.append(twin)
    with pytest.raises(ValueError, match="decodes q otherwise than another node does"):
        integer_layers(traced)
