from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from graphs import names
from graphs.checks import GraphError, check, check_preserved
from graphs.equalizer import encode
from graphs.expressions import Expression, RotateOutput
from graphs.ops import OPS
from graphs.passes import make_linear
from graphs.traced import Signs

TEXT = """
mlp (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    r = Rotate<block = 12, seed = 3>(x)
    u = Linear<rows = 48, cols = 24>(r)
    a = Relu(u)
    v = Linear<rows = 24, cols = 48, bits = 8, bias = 0>(a)
    y = Add(x, v)
}
"""


@pytest.fixture
def traced(parse):
    traced = parse(TEXT)
    check(traced)
    return traced


def node(traced, op):
    return next(node for node in traced.graph.nodes if node.op == op)


def tensor(traced, name):
    return traced.graph.tensors()[name]


def graph_input(traced, name):
    return next(tensor for tensor in traced.graph.inputs if tensor.name == name)


def attribute(op, name, value):
    def edit(traced):
        node(traced, op).attrs[name] = value

    return edit


def no_attribute(op, name):
    def edit(traced):
        del node(traced, op).attrs[name]

    return edit


def weight(**changes):
    def edit(traced):
        traced.linears["u.codes"] = replace(traced.linears["u.codes"], **changes)

    return edit


def shape(name, sizes):
    def edit(traced):
        tensor(traced, name).shape = sizes

    return edit


def reads(op, index, name):
    def edit(traced):
        node(traced, op).inputs[index] = tensor(traced, name)

    return edit


def order(traced):
    traced.graph.nodes.reverse()


def two_tensors_of_one_name(traced):
    node(traced, "Relu").inputs = [gs.Variable("u", np.float32, ["batch", "tokens", 48])]


def defined_twice(traced):
    twin = gs.Variable("a", np.float32, ["batch", "tokens", 48])
    traced.graph.nodes.append(gs.Node("Neg", "twin", inputs=[tensor(traced, "a")], outputs=[twin]))


def undefined(traced):
    node(traced, "Relu").inputs = [gs.Variable("nowhere", np.float32, ["batch", "tokens", 48])]


def output_lost(traced):
    tensor(traced, "y").inputs.clear()


def dangling_rotation(traced):
    rotation = node(traced, "HadamardRotate")
    transpose = tensor(traced, "u_open").inputs[0]
    transpose.inputs[0] = rotation.inputs[0]


def rotated_in_a_branch(traced):
    x, inner = graph_input(traced, "x"), gs.Variable("inner", np.float32)
    signs = node(traced, "HadamardRotate").inputs[1]
    rotate = gs.Node("HadamardRotate", "hidden", {"block": 12}, [x, signs], [inner], domain="lrq")
    branch = gs.Graph([rotate], outputs=[inner])
    flag = gs.Constant("flag", np.array(True))
    attributes = {"then_branch": branch, "else_branch": branch}
    traced.graph.nodes.append(gs.Node("If", "choice", attributes, [flag], [gs.Variable("z", np.float32)]))


def rotated_in_a_branch_of_a_branch(traced):
    rotated_in_a_branch(traced)
    choice = traced.graph.nodes.pop()
    flag, attributes = choice.inputs[0], {name: gs.Graph([choice], outputs=choice.outputs) for name in choice.attrs}
    traced.graph.nodes.append(gs.Node("If", "outer", attributes, [flag], [gs.Variable("z2", np.float32)]))


def weight_without_row(traced):
    del traced.linears["u.codes"]


def row_without_input(traced):
    traced.tensors["ghost"] = Expression("ghost", (3,))


def weight_nobody_reads(traced):
    traced.tensors["idle"] = Expression("idle", (3,))
    traced.graph.inputs.append(gs.Variable("idle", np.float32, [3]))


def signs_of_twos(traced):
    node(traced, "HadamardRotate").inputs[1].values = np.full(24, 2, np.float32)


def signs_without_their_seed(traced):
    traced.signs["signs24_3"] = Signs()


def signs_without_their_divisors(traced):
    traced.signs["signs24_3"] = Signs(3, encode(np.full(24, 2.0)))


def signs_fed(traced):
    fed = gs.Variable("signs24_3", np.float32, [24])
    node(traced, "HadamardRotate").inputs[1] = fed
    traced.graph.inputs.append(fed)


def codes_held_as(dtype):
    def edit(traced):
        graph_input(traced, "u.codes").dtype = np.dtype(dtype)

    return edit


def int4_codes_of_three_bits(traced):
    weight(bits=3)(traced)
    attribute("TwinLogDequant", "bits", 3)(traced)
    graph_input(traced, "u.codes").shape = [48, 3, 3]
    check(traced)
    codes_held_as(ml_dtypes.int4)(traced)


def wrong_type(traced):
    graph_input(traced, "x").dtype = np.float16


def misspelt_op(traced):
    node(traced, "HadamardRotate").op = "HadamardRotat"


def input_missing(traced):
    node(traced, "TwinLogDequant").inputs.pop()


def unknown_standard_op(traced):
    node(traced, "Relu").op = "Rulu"


def rotated_weight_of_other_rows(traced):
    traced.tensors["u_bias"] = Expression("u.bias", (24,))


BROKEN = {
    "nodes out of order": (order, ["Add 'Add.", "that nothing before it computes"]),
    "undefined tensor": (undefined, ["Relu 'Relu.", "reads 'nowhere' that nothing before it computes"]),
    "one name, two tensors": (two_tensors_of_one_name, ["Relu 'Relu.", "reads a second tensor named 'u'"]),
    "one name, two nodes": (defined_twice, ["Neg 'twin'", "defines 'a', which is defined already"]),
    "output lost": (output_lost, ["graph output 'y'", "nothing computes it"]),
    "unknown op": (misspelt_op, ["HadamardRotat 'rotate.r'", "is not an op of the dialect"]),
    "unknown attribute": (attribute("HadamardRotate", "blok", 12), ["'rotate.r'", "no attribute 'blok'"]),
    "missing attribute": (no_attribute("TwinLogDequant", "bits"), ["TwinLogDequant.bits is required"]),
    "attribute of a wrong type": (attribute("HadamardRotate", "block", "12"), ["takes an integer, got '12'"]),
    "attribute out of range": (attribute("TwinLogDequant", "bits", 5), ["bits is 5; it must be one of [2, 3, 4]"]),
    "input missing": (input_missing, ["has 2 inputs and 1 outputs", "needed codes, exponents, scale"]),
    "block does not divide": (attribute("HadamardRotate", "block", 16), ["HadamardRotate 'rotate.r'", "16"]),
    "another factorization": (attribute("HadamardRotate", "order", 5), ["factorizes with base 12 and order 11"]),
    "declared shape": (shape("r", ["batch", "tokens", 23]), ["'r' is declared ('batch', 'tokens', 23)"]),
    "declared rank": (shape("u_w", [48, 24, 1]), ["'u_w' is declared (48, 24, 1)", "needed (48, 24)"]),
    "one declared size of two": (shape("u_w", [48, 23]), ["'u_w' is declared (48, 23)", "needed (48, 24)"]),
    "codes of another shape": (shape("u.codes", [48, 1, 23]), ["axis 2 of codes is 23, needed 24"]),
    "codes widened": (codes_held_as(np.int32), ["its codes 'u.codes' are int32, needed int4 as its layout says"]),
    "codes without a sign": (codes_held_as(np.uint8), ["'u.codes' are uint8, needed int4 as its layout says"]),
    "codes of another width": (int4_codes_of_three_bits, ["'u.codes' are int4, needed int8 as its layout says"]),
    "rows of the table": (
        weight(weight=Expression("u.weight", (24, 24))), ["rows is 48", "needed 24 as u in the weight table"]),
    "bits of the table": (weight(bits=3), ["bits is 4, needed 3 as u"]),
    "group size of the table": (weight(group_size=12), ["group_size is 24, needed 12 as u"]),
    "weight without a row": (weight_without_row, ["its codes 'u.codes' are in no row of the weight table"]),
    "scale of another layer": (reads("TwinLogDequant", 2, "u_bias"), ["its scale are 'u_bias', needed 'u.scale'"]),
    "row without a graph input": (row_without_input, ["weight 'ghost'", "the table has it but the graph does not"]),
    "weight that nobody reads": (weight_nobody_reads, ["weight 'idle': nobody reads it"]),
    "bias of another length": (rotated_weight_of_other_rows, ["weight 'u_bias'", "shape (48,), needed (24,)"]),
    "dangling rotation": (dangling_rotation, ["HadamardRotate 'rotate.r': nobody reads the rotated tensor"]),
    "lrq node in a subgraph": (rotated_in_a_branch, ["'hidden': sits in a subgraph of If 'choice'"]),
    "lrq node in a subgraph of one": (
        rotated_in_a_branch_of_a_branch, ["'hidden': sits in a subgraph of If 'outer'"]),
    "signs that are not signs": (signs_of_twos, ["its signs 'signs24_3' are in the table", "a constant of +-1"]),
    "signs that are fed": (signs_fed, ["its signs 'signs24_3' are in the table", "a constant of +-1"]),
    "signs that lost their seed": (signs_without_their_seed, ["are negative, needed none where the table has no"]),
    "signs that lost divisors": (signs_without_their_divisors, ["are in the table", "a constant of +-1 / d"]),
    "types that do not fit": (wrong_type, ["the ONNX checker"]),
    "unknown standard op": (unknown_standard_op, ["the ONNX checker", "Rulu"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "parts"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_graph_is_refused_in_one_line_that_says_where(damage, parts, traced):
    damage(traced)
    with pytest.raises(GraphError) as caught:
        check(traced)
    assert "\n" not in str(caught.value)
    assert "needed" in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_divisors_are_asked_of_equalized_channels_alone(traced):
    signs_of_twos(traced)
    with pytest.raises(GraphError, match=r"needed a constant of \+-1$"):
        check(traced)


@pytest.mark.parametrize("declared", [None, ["n", None, 24], [5, "tokens", "channels"]])
def test_a_shape_may_be_declared_in_part_or_not_at_all(traced, declared):
    """Sizes that are no numbers may have any names."""
    shape("r", declared)(traced)
    check(traced)
    make_linear(traced)  # which reads it, and what it computes has a shape
    check(traced)


def test_signs_without_a_seed_are_ones(parse):
    check(parse(TEXT.replace(", seed = 3", "")))


def test_what_a_node_leaves_out_has_no_name_to_share(parse):
    """Of inputs and outputs: Clip has no lower bound, neither norm hands out its mean."""
    check(
        parse("""
        g (float[2, 4] x, float[4] scale, float high) => (float[2, 4] y, float[2, 1] d, float[2, 1] e)
        {
            a = Clip(x, "", high)
            b, "", d = LayerNormalization(a, scale)
            y, "", e = LayerNormalization(b, scale)
        }
    """)
    )


def test_a_linear_must_carry_the_activation_bits_of_the_table(traced):
    make_linear(traced)
    check(traced)
    node(traced, "TwinLogLinear").attrs["act_bits"] = 6
    with pytest.raises(GraphError, match="TwinLogLinear 'u': act_bits is 6, needed 8 as u"):
        check(traced)


@pytest.mark.parametrize("closed", [False, True])
def test_a_codebook_of_another_layer_is_refused(closed, parse):
    """Of the same shape, so that only the name tells."""
    traced = parse("""
        two (float[batch, 24] x) => (float[batch, 24] y)
        {
            u = Linear<rows = 24, cols = 24, codebook = 1>(x)
            y = Linear<rows = 24, cols = 24, codebook = 1>(u)
        }
    """)
    if closed:
        make_linear(traced)
    check(traced)
    first, second = (each for each in traced.graph.nodes if each.op.startswith("Codebook"))
    index = next(i for i, each in enumerate(first.inputs) if each.name == "u.table")
    first.inputs[index] = second.inputs[index]
    with pytest.raises(GraphError, match=f"{first.op} .*its table are 'y.table', needed 'u.table'"):
        check(traced)


def test_a_rotation_may_be_an_output_of_the_graph(parse):
    """And need have no other reader then."""
    check(parse(TEXT.replace("24] y)", "24] y, float[batch, tokens, 24] r)").replace("(r)", "(x)")))


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.int4])
def test_codes_of_four_bits_may_have_the_type_of_a_trace_or_of_their_layout(traced, dtype):
    codes_held_as(dtype)(traced)
    check(traced)


def test_checking_makes_the_dialect_known_to_onnx(traced):
    """Whatever ran before: ONNX lets nodes of ops that it does not know pass."""
    for op in OPS:
        onnx.defs.deregister_schema(op, names.OPSET, names.DOMAIN)
    wrong_type(traced)
    with pytest.raises(GraphError, match="the ONNX checker"):
        check(traced)
    assert all(onnx.defs.has(op, names.OPSET, names.DOMAIN) for op in OPS)


def test_checking_does_not_change_the_graph(traced):
    before = traced.to_onnx()
    check(traced)
    assert traced.to_onnx() == before


def test_rewriting_weights_preserves_the_interface(traced):
    after = traced.copy()
    after.rotate_outputs({"u.codes": RotateOutput(48), "u_bias": RotateOutput(48)})
    check_preserved(traced, after)


def renamed_output(traced):
    traced.graph.outputs[0].name = "z"


def retyped_input(traced):
    graph_input(traced, "x").dtype = np.float16


def reshaped_input(traced):
    graph_input(traced, "x").shape = [2, "tokens", 24]


def forgotten_weight(traced):
    del traced.tensors["u_bias"]


def lost_output(traced):
    traced.graph.outputs.clear()


def output_of_no_type(traced):
    traced.graph.outputs[0].dtype = None


INTERFACE = {
    "lost output": (lost_output, r"the graph's outputs: got none new, needed float32\[batch, tokens, 24\] y"),
    "no type": (output_of_no_type, r"the graph's outputs: got None\[batch, tokens, 24\] y, needed float32"),
    "renamed output": (renamed_output, r"the graph's outputs: got float32\[batch, tokens, 24\] z, needed .* y"),
    "another type": (retyped_input, r"model inputs: got float16\[batch, tokens, 24\] x, needed float32"),
    "another shape": (reshaped_input, r"model inputs: got float32\[2, tokens, 24\] x, needed"),
    "a weight that became an input": (forgotten_weight, r"model inputs: got float32\[48\] u_bias, needed no more"),
}


def test_an_output_of_a_type_that_numpy_lacks_and_of_unknown_rank_is_compared_too(parse):
    text = "g (bfloat16[n, 4] x) => (bfloat16[n, 4] y, bfloat16[n, 4] z) { y = Relu(x) z = Neg(x) }"
    traced = parse(text)
    traced.graph.outputs[1].shape = None
    after = traced.copy()
    check_preserved(traced, after)
    after.graph.outputs[1].dtype = np.float16
    with pytest.raises(GraphError, match=r"outputs: got float16\[\] z, needed \w+\[\] z"):
        check_preserved(traced, after)


@pytest.mark.parametrize(("damage", "message"), INTERFACE.values(), ids=INTERFACE.keys())
def test_a_changed_interface_is_refused(damage, message, traced):
    after = traced.copy()
    damage(after)
    with pytest.raises(GraphError, match=message):
        check_preserved(traced, after)


def test_a_changed_order_of_outputs_is_refused(parse):
    traced = parse(TEXT.replace("24] y)", "24] y, float[batch, tokens, 24] r)"))
    after = traced.copy()
    after.graph.outputs.reverse()
    with pytest.raises(GraphError, match="got the order"):
        check_preserved(traced, after)


def test_the_checked_model_is_valid_onnx_for_others_too(traced):
    onnx.checker.check_model(traced.to_onnx())


def test_a_quantized_weight_is_not_kept_in_floating_point_instead(traced):
    """Its function stays the same to the last bit, and nothing is left of what the package is for."""
    before = traced.copy()
    (transpose,) = tensor(traced, "u_wt").inputs
    (codes, weight) = next((name, each) for name, each in traced.linears.items() if each.layer == "u")
    wide = gs.Variable("u.wide", np.float32, list(weight.weight.shape))
    traced.graph.inputs.append(wide)
    traced.tensors["u.wide"] = weight.weight
    transpose.inputs = [wide]
    traced.forget_unused()
    check(traced)
    assert codes not in traced.linears
    with pytest.raises(
        GraphError, match=r"the weight of u: kept in floating point as 'u\.wide', needed 4 bits as before"
    ):
        check_preserved(before, traced)


def test_nor_is_it_under_the_name_of_another(traced):
    before = traced.copy()
    traced.tensors["u_bias"] = traced.linears["u.codes"].weight
    with pytest.raises(GraphError, match="the weight of u: kept in floating point as 'u_bias'"):
        check_preserved(before, traced)


def test_a_layer_may_go(parse):
    before = parse(TEXT)
    traced = before.copy()
    traced.graph.outputs[0].inputs[0].inputs = [traced.graph.tensors()["x"], traced.graph.tensors()["x"]]
    traced.forget_unused()
    assert not traced.linears
    check_preserved(before, traced)
