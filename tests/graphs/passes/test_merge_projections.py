from dataclasses import replace

import onnx_graphsurgeon as gs
import pytest
from graph_texts import ATTENTION, edited

from graphs.checks import GraphError, check, check_preserved
from graphs.expressions import StackRows
from graphs.passes import make_linear, merge_projections
from graphs.passes.merge_projections import _common_name

Q, K, V = (f"{name} = Linear<rows = 24, cols = 24>(x)" for name in "qkv")


CROSS = edited(
    ATTENTION,
    ("24] x)", "24] x, float[batch, text, 20] caption)"),
    (K, "k = Linear<rows = 24, cols = 20>(caption)"),
    (V, "v = Linear<rows = 24, cols = 20>(caption)"),
)
# Text, the stacked codes of every layer that is merged.
FIRES = {
    "self-attention": (ATTENTION, [("q", "k", "v")]),
    "cross-attention": (CROSS, [("k", "v")]),
    "no biases": (ATTENTION.replace("rows = 24,", "bias = 0, rows = 24,"), [("q", "k", "v")]),
    "8 bits": (ATTENTION.replace("rows = 24,", "bits = 8, rows = 24,"), [("q", "k", "v")]),
    "3 bits": (ATTENTION.replace("rows = 24,", "bits = 3, rows = 24,"), [("q", "k", "v")]),
    "a codebook": (ATTENTION.replace("rows = 24,", "codebook = 1, rows = 24,"), [("q", "k", "v")]),
    "masked": (
        edited(
            ATTENTION,
            ("24] x)", "24] x, float[batch, 1, 1, tokens] mask)"),
            ("p = Softmax(scores)", "masked = Add(mask, scores) p = Softmax(masked)"),
        ),
        [("q", "k", "v")],
    ),
    "softly capped": (
        edited(
            ATTENTION, ("merge = {0, 0, 24}", "merge = {0, 0, 24}, float cap = {30}"),
            ("p = Softmax(scores)",
             "less = Div(scores, cap) bent = Tanh(less) capped = Mul(bent, cap) p = Softmax(capped)"),
        ),
        [("q", "k", "v")],
    ),
    "masked by a product with a table": (
        edited(
            ATTENTION, ("24] x)", "24] x, float[batch, 1, tokens, 5] hot, float[5, tokens] table)"),
            ("p = Softmax(scores)", "places = Abs(hot) bias = MatMul(places, table) masked = Add(bias, scores) "
             "p = Softmax(masked)"),
        ),
        [("q", "k", "v")],
    ),
    "masked by a layer in floating point": (
        edited(
            ATTENTION, ("[batch, tokens, 24] x)", "[batch, 7, 24] x, float[7, 5] hot)"),
            ("[batch, tokens, 24] y)", "[batch, 7, 24] y)"),
            ("p = Softmax(scores)", "places = Abs(hot) bias = Kept<rows = 7, cols = 5>(places) "
             "masked = Add(bias, scores) p = Softmax(masked)"),
        ),
        [("q", "k", "v")],
    ),
    "masked by a choice": (
        edited(
            ATTENTION,
            ("24] x)", "24] x, float[batch, 1, 1, tokens] mask)"),
            ("merge = {0, 0, 24}", "merge = {0, 0, 24}, float[1] least = {-1000}"),
            ("p = Softmax(scores)",
             "kept = Cast<to = 9>(mask) masked = Where(kept, scores, least) p = Softmax(masked)"),
        ),
        [("q", "k", "v")],
    ),
    "masked twice, and guarded from rows that are masked altogether": (
        edited(
            ATTENTION,
            ("24] x)", "24] x, float[batch, 1, 1, tokens] mask)"),
            ("merge = {0, 0, 24}", "merge = {0, 0, 24}, float[1] least = {-1000}, float[1] nought = {0}"),
            ("p = Softmax(scores)",
             "less = Mul(mask, least) kept = Cast<to = 9>(mask) biased = Add(less, scores) "
             "masked = Where(kept, biased, least) raw = Softmax(masked) lost = IsNaN(raw) "
             "p = Where(lost, nought, raw)"),
        ),
        [("q", "k", "v")],
    ),
    "keys that are fed": (
        edited(
            ATTENTION, ("24] x)", "24] x, float[batch, 2, 12, tokens] fed)"), ("MatMul(qh, kh)", "MatMul(qh, fed)")),
        [("q", "v")],
    ),
    "in six steps": (
        edited(
            ATTENTION,
            ("24] x)", "24] x, float[batch, 1, 1, tokens] mask)"),
            ("merge = {0, 0, 24}", "merge = {0, 0, 24}, float cap = {30}, float[1] least = {-1000}"),
            ("p = Softmax(scores)", "kept = Cast<to = 9>(mask) less = Div(scores, cap) bent = Tanh(less) "
             "capped = Mul(bent, cap) masked = Add(capped, mask) chosen = Where(kept, masked, least) "
             "cooled = Div(chosen, cap) p = Softmax(cooled)"),
        ),
        [("q", "k", "v")],
    ),
    "scaled and normalized queries": (
        edited(
            ATTENTION,
            ("merge = {0, 0, 24}", "merge = {0, 0, 24}, float[1] half = {0.5}"),
            ("qh = Transpose<perm = [0, 2, 1, 3]>(q4)", "qr = Transpose<perm = [0, 2, 1, 3]>(q4) qs = Mul(qr, half) "
             "squares = Mul(qs, qs) sums = Sqrt(squares) qh = Add(qs, sums)"),
        ),
        [("q", "k", "v")],
    ),
    "a query of another width of activations": (
        edited(ATTENTION, (Q, "q = Linear<rows = 24, act_bits = 6, cols = 24>(x)")), [("k", "v")]),
    "a query in floating point": (
        edited(ATTENTION, (Q, "q = Linear<rows = 24, act_bits = 16, cols = 24>(x)")), [("k", "v")]),
    "a value of 8 bits": (
        edited(ATTENTION, (V, "v = Linear<rows = 24, bits = 8, cols = 24>(x)")), [("q", "k")]),
    "probabilities that are also read elsewhere": (
        edited(ATTENTION, ("24] y)", "24] y, float[batch, 2, tokens, tokens] z)"), ("mixed =", "z = Neg(p) mixed =")),
        [("q", "k", "v")]),
    "text and image in one attention": (
        edited(
            ATTENTION,
            ("24] x)", "24] x, float[batch, text, 20] caption)"),
            ("k4 = Reshape(k, split)", "tk = Linear<rows = 24, cols = 20>(caption) ka = Concat<axis = 1>(tk, k) "
             "k4 = Reshape(ka, split)"),
            ("v4 = Reshape(v, split)", "tv = Linear<rows = 24, cols = 20>(caption) va = Concat<axis = 1>(tv, v) "
             "v4 = Reshape(va, split)"),
        ),
        [("q", "k", "v"), ("tk", "tv")],
    ),
}  # fmt: skip


@pytest.fixture(params=FIRES.values(), ids=FIRES.keys())
def case(request, parse):
    text, stacks = request.param
    traced = parse(text)
    make_linear(traced)
    return traced, stacks


def stacked_layers(traced):
    stacks = [parts for name, parts in traced.stacks.items() if name.endswith(".codes")]
    return sorted(tuple(part.removesuffix(".codes") for part in parts) for parts in stacks)


def test_merges_what_meets_in_an_attention_and_keeps_the_function(case, difference):
    traced, stacks = case
    before = traced.copy()
    assert merge_projections(traced).fired == len(stacks)
    assert stacked_layers(traced) == sorted(stacks)
    splits = [node for node in traced.graph.nodes if node.op == "Split"]
    assert len(splits) == len(stacks)
    for split in splits:
        assert split.inputs[0].shape == [*split.outputs[0].shape[:-1], 24 * len(split.outputs)]
    check(traced)
    check_preserved(before, traced)
    assert traced.linears == before.linears  # each is still quantized by itself
    assert difference(before, traced) <= 1e-12


FUSED = """
fused (float[batch, tokens, 24] x, float[batch, text, 24] c) => (float[batch, tokens, 24] y)
{
    q = Linear<rows = 24, cols = 24>(x)
    k = Linear<rows = 24, cols = 24>(SOURCE)
    v = Linear<rows = 24, cols = 24>(SOURCE)
    y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)
}
"""


@pytest.mark.parametrize(("source", "merged"), [("x", ("q", "k", "v")), ("c", ("k", "v"))])
def test_merges_what_meets_in_an_attention_of_one_node(parse, difference, source, merged):
    traced = parse(FUSED.replace("SOURCE", source), opset=23)
    make_linear(traced)
    before = traced.copy()
    assert merge_projections(traced).fired == 1
    assert stacked_layers(traced) == [merged]
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-12


def test_merging_again_does_nothing(case):
    traced, _ = case
    merge_projections(traced)
    before = traced.to_onnx()
    assert merge_projections(traced).fired == 0
    assert traced.to_onnx() == before


def test_a_merged_graph_survives_a_round_trip(case, difference):
    traced, _ = case
    merge_projections(traced)
    again = type(traced).from_onnx(traced.to_onnx())
    assert again.stacks == traced.stacks
    check(again)
    assert difference(traced, again) == 0


def test_two_attentions_on_one_text_keep_their_own(parse):
    """Their keys and values would otherwise all be computed at the first."""
    second = edited(
        CROSS[CROSS.index("{\n    q =") + 1 :].replace("}", ""),
        ("q = Linear<rows = 24, cols = 24>(x)", "q = Linear<rows = 24, cols = 24>(y)"),
    )
    for name in ("q", "k", "v", "q4", "k4", "v4", "qh", "kh", "vh", "scores", "p", "mixed", "back", "merged", "y"):
        second = second.replace(f" {name} =", f" {name}_2 =").replace(f"({name},", f"({name}_2,")
        second = second.replace(f"({name})", f"({name}_2)").replace(f", {name})", f", {name}_2)")
    second = second.replace("(y_2)", "(y)")
    text = CROSS.rstrip().removesuffix("}") + second + "}"
    traced = parse(text.replace("=> (float[batch, tokens, 24] y)", "=> (float[batch, tokens, 24] y_2)"))
    make_linear(traced)
    assert merge_projections(traced).fired == 2
    assert stacked_layers(traced) == [("k", "v"), ("k_2", "v_2")]


def test_the_rows_are_those_of_query_key_and_value_in_this_order(parse):
    traced = parse(ATTENTION)
    make_linear(traced)
    merge_projections(traced)
    (codes,) = [name for name in traced.codes_inputs() if name in traced.stacks]
    expression = traced.expression(codes)
    assert (expression.source, expression.shape) == ("q.weight", (72, 24))
    assert [other.source for step in expression.maps for other in step.others] == ["k.weight", "v.weight"]
    assert isinstance(expression.maps[0], StackRows)
    assert codes == "q+k+v.codes"


UNKNOWN = "others read the same input, but they meet in no attention of a known form"
A_BIAS_MISSING = "some of these projections have a bias and others have none"
NOT = {
    "one input each": (
        [(K, "ax = Abs(x) k = Linear<rows = 24, cols = 24>(ax)"),
         (V, "rx = Relu(x) v = Linear<rows = 24, cols = 24>(rx)")],
        None,
    ),
    "no attention": ([("p = Softmax(scores)", "p = Relu(scores)")], UNKNOWN),
    "the softmax is of one projection": (
        [("scores = MatMul(qh, kh)", "scores = Abs(qh)"), ("MatMul(p, vh)", "Mul(p, vh)")], UNKNOWN),
    "the probabilities are the right operand": (
        [("MatMul(p, vh)", "MatMul(kh, p)"),
         ("back = Transpose<perm = [0, 2, 1, 3]>", "back = Transpose<perm = [0, 3, 1, 2]>")], UNKNOWN),
    "the softmax is of an input": (
        [("24] x)", "24] x, float[batch, 2, tokens, tokens] s)"), ("Softmax(scores)", "Softmax(s)")], None),
    "the scores are scaled by what is computed of them": (
        [("p = Softmax(scores)", "bent = Abs(scores) scaled = Mul(scores, bent) p = Softmax(scaled)")], UNKNOWN),
    "an activation of the scores": ([("p = Softmax(scores)", "bent = Relu(scores) p = Softmax(bent)")], UNKNOWN),
    "scores that are the sum of two products": (
        [("p = Softmax(scores)", "qm = Neg(qh) more = MatMul(qm, kh) both = Add(scores, more) p = Softmax(both)")],
        UNKNOWN),
    "two products with the probabilities": (
        [("24] y)", "24] y, float[batch, 2, tokens, 12] z)"), ("mixed =", "z = MatMul(p, qh) mixed =")], UNKNOWN),
    "no product with the probabilities": (
        [("24] y)", "24] y, float[batch, 2, tokens, tokens] p)"), ("MatMul(p, vh)", "Identity(vh)")], UNKNOWN),
    "a bias that is an input of the graph": (
        [("24] x)", "24] x, float[24] b)"), (K, "u = Linear<rows = 24, bias = 0, cols = 24>(x) k = Add(u, b)")],
        "the bias of u is not a weight"),
    "a bias beside none": ([(K, "k = Linear<rows = 24, bias = 0, cols = 24>(x)")], A_BIAS_MISSING),
    "an output of the graph": ([("24] y)", "24] y, float[batch, tokens, 24] k)")], "k is an output of the graph"),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "reason"), NOT.values(), ids=NOT.keys())
def test_does_not_fire_and_says_why(parse, edits, reason):
    traced = parse(edited(ATTENTION, *edits))
    make_linear(traced)
    before = traced.to_onnx()
    result = merge_projections(traced)
    assert result.fired == 0
    first = min(node.name for node in traced.graph.nodes if node.op == "TwinLogLinear") if reason is UNKNOWN else "q"
    assert [(skip.node, skip.reason) for skip in result.skipped] == ([] if reason is None else [(first, reason)])
    assert traced.to_onnx() == before


def test_half_filled_bytes_are_not_stacked(parse):
    """15 x 15 codes of 4 bits end in the middle of a byte."""
    odd = ATTENTION.replace("24", "15").replace("2, 12}", "3, 5}")
    traced = parse(odd)
    make_linear(traced)
    result = merge_projections(traced)
    assert list(result.reasons()) == ["the codes of q do not fill whole bytes"]


def test_a_projection_in_other_groups_is_a_near_miss(parse):
    traced = parse(ATTENTION)
    make_linear(traced)
    value = next(node for node in traced.graph.nodes if node.name == "v")
    value.attrs["group_size"] = 12
    traced.linears["v.codes"] = replace(traced.linears["v.codes"], group_size=12)
    value.inputs[2].shape = [24, 2, 2, 3]
    check(traced)
    assert list(merge_projections(traced).reasons()) == [
        "another projection reads the same, in another format or width of activations"
    ]
    assert stacked_layers(traced) == [("q", "k")]


def test_layers_of_unlike_rows_are_merged(parse, difference):
    """Two heads of queries that share one of keys and values."""
    text = edited(
        FUSED.replace("SOURCE", "x"), ("kv_num_heads = 2", "kv_num_heads = 1"),
        ("k = Linear<rows = 24", "k = Linear<rows = 12"), ("v = Linear<rows = 24", "v = Linear<rows = 12"),
    )  # fmt: skip
    traced = parse(text, opset=23)
    make_linear(traced)
    before = traced.copy()
    assert merge_projections(traced).fired == 1
    (split,) = [node for node in traced.graph.nodes if node.op == "Split"]
    assert split.inputs[1].values.tolist() == [24, 12, 12]
    check(traced)
    assert difference(before, traced) <= 1e-12


def test_what_is_merged_is_not_merged_again_with_others(parse):
    traced = parse(edited(ATTENTION, (Q, "q = Linear<rows = 24, act_bits = 6, cols = 24>(x)")))
    make_linear(traced)
    assert merge_projections(traced).fired == 1
    query = next(node for node in traced.graph.nodes if node.name == "q")
    query.attrs["act_bits"], traced.linears["q.codes"] = 8, replace(traced.linears["q.codes"], act_bits=8)
    check(traced)
    assert list(merge_projections(traced).reasons()) == ["k+v is merged with others already"]


def test_an_input_of_no_known_shape_is_projected_as_one(parse):
    text = ATTENTION.replace("cols = 24>(x)", "cols = 24>(r)")
    traced = parse(edited(text, ("24] x)", "24] x, int64[n] s)"), ("q =", "r = Reshape(x, s) q =")))
    make_linear(traced)
    assert merge_projections(traced).fired == 1
    check(traced)


def test_rows_are_in_the_order_of_the_first_place_that_each_has(parse):
    text = edited(
        FUSED.replace("SOURCE", "x"), ("24] y)", "24] y, float[batch, tokens, 24] z)"),
        ("y =", "z = Attention<q_num_heads = 2, kv_num_heads = 2>(v, k, q) y ="),
    )  # fmt: skip
    traced = parse(text, opset=23)
    make_linear(traced)
    assert merge_projections(traced).fired == 1
    assert stacked_layers(traced) == [("q", "v", "k")]


def test_what_is_added_to_itself_many_times_takes_no_time(parse):
    """Forty sums of two lead up to the layer in 2^40 ways."""
    sums = " ".join(f"s{n + 1} = Add(s{n}, s{n})" for n in range(40))
    traced = parse(edited(ATTENTION, ("q4 = Reshape(q, split)", f"s0 = Neg(q) {sums} q4 = Reshape(s40, split)")))
    make_linear(traced)
    assert merge_projections(traced).fired == 1
    assert stacked_layers(traced) == [("q", "k", "v")]


NAMES = {
    ("blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_v"): "blocks.0.to_q+to_k+to_v",
    ("blocks.0.to_q", "blocks.1.to_k"): "blocks.0.to_q+blocks.1.to_k",
    ("blocks.0.to_q", "to_k"): "blocks.0.to_q+to_k",
    ("to_q", "to_k"): "to_q+to_k",
}


@pytest.mark.parametrize(("layers", "name"), NAMES.items())
def test_what_is_merged_has_the_name_of_the_module_that_they_share(layers, name):
    assert _common_name(list(layers)) == name


def test_what_makes_the_mask_of_an_attention_is_no_projection(parse):
    text = edited(
        FUSED.replace("SOURCE", "x"), ("(q, k, v)", "(q, k, v, mask)"), ("tokens, 24] x", "24, 24] x"),
        ("batch, tokens, 24] y", "batch, 24, 24] y"), ("y =", "mask = Linear<rows = 24, cols = 24>(x) y ="),
    )  # fmt: skip
    traced = parse(text, opset=23)
    make_linear(traced)
    merge_projections(traced)
    assert stacked_layers(traced) == [("q", "k", "v")]


@pytest.mark.parametrize("place", range(1, 5), ids=["codes", "exponents", "scale", "bias"])
def test_a_weight_that_is_also_read_elsewhere_is_left_alone(parse, place):
    traced = parse(ATTENTION)
    make_linear(traced)
    key = next(node for node in traced.graph.nodes if node.name == "k")
    traced.graph.nodes.append(gs.Node("Abs", "other", {}, [key.inputs[place]], [gs.Variable("read")]))
    assert list(merge_projections(traced).reasons()) == ["a weight of k is also read elsewhere"]


# What a wrong merge would do: each must show in the function or be refused.
def swapped(traced):
    name = "q+k+v.codes"
    for stack in list(traced.stacks):
        first, second, third = traced.stacks[stack]
        traced.stacks[stack] = (second, first, third)
    assert name in traced.stacks


def biases_swapped(traced):
    first, second, third = traced.stacks["q+k+v.bias"]
    traced.stacks["q+k+v.bias"] = (first, third, second)


def outputs_swapped(traced):
    split = next(node for node in traced.graph.nodes if node.op == "Split")
    split.outputs = [split.outputs[1], split.outputs[0], split.outputs[2]]


@pytest.mark.parametrize("wrong", [swapped, biases_swapped, outputs_swapped])
def test_a_wrong_merge_changes_the_function(parse, difference, wrong):
    traced = parse(ATTENTION)
    make_linear(traced)
    before = traced.copy()
    merge_projections(traced)
    wrong(traced)
    check(traced)
    assert difference(before, traced) > 1e-3


def test_check_refuses_stacks_that_do_not_belong_together(parse):
    traced = parse(ATTENTION)
    make_linear(traced)
    merge_projections(traced)
    scale = traced.stacks["q+k+v.scale"]
    traced.stacks["q+k+v.scale"] = scale[::-1]
    with pytest.raises(GraphError, match=r"its scale are 'v\.scale', 'k\.scale', 'q\.scale', needed 'q\.scale'"):
        check(traced)
    traced.stacks["q+k+v.scale"] = scale
    traced.linears["k.codes"] = replace(traced.linears["k.codes"], bits=3)
    with pytest.raises(GraphError, match="bits is 4, needed 3 as k in the weight table"):
        check(traced)
    traced.linears["k.codes"] = replace(traced.linears["k.codes"], bits=4)
    traced.stacks["q+k+v.bias"] += ("y_bias",)
    with pytest.raises(GraphError, match="'y_bias': it is a graph input and a part of another, needed one of both"):
        check(traced)
    traced.stacks["q+k+v.bias"] = traced.stacks["q+k+v.bias"][:2]
    del traced.tensors["v_bias"]
    with pytest.raises(GraphError, match=r"its graph input has shape \(72,\), needed \(48,\)"):
        check(traced)


SHARED_QUERY = """
shared (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y, float[batch, tokens, 24] z)
{
    q = Linear<rows = 24, cols = 24>(x)
    k = Linear<rows = 24, cols = 24>(x)
    v = Linear<rows = 24, cols = 24>(x)
    k2 = Linear<rows = 24, cols = 24>(x)
    v2 = Linear<rows = 24, cols = 24>(x)
    y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)
    z = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k2, v2)
}
"""


@pytest.mark.parametrize("order", [1, -1])
def test_what_two_attentions_share_stays_apart_in_any_order_of_nodes(parse, difference, order):
    traced = parse(SHARED_QUERY, opset=23)
    make_linear(traced)
    attentions = [node for node in traced.graph.nodes if node.op == "Attention"]
    others = [node for node in traced.graph.nodes if node.op != "Attention"]
    traced.graph.nodes = [*others, *attentions[::order]]
    before = traced.copy()
    assert merge_projections(traced).fired == 2
    assert stacked_layers(traced) == [("k", "v"), ("k2", "v2")]
    check(traced)
    assert difference(before, traced) <= 1e-12


SCALED = {
    "scores, then masked": [
        ("24] x)", "24] x, float[batch, 1, 1, tokens] mask)"),
        ("p = Softmax(scores)", "small = Mul(half, scores) masked = Add(small, mask) p = Softmax(masked)")],
    "scores": [("p = Softmax(scores)", "small = Div(scores, half) p = Softmax(small)")],
    "probabilities": [("mixed = MatMul(p, vh)", "small = Mul(half, p) mixed = MatMul(small, vh)")],
}  # fmt: skip


@pytest.mark.parametrize("edits", SCALED.values(), ids=SCALED.keys())
def test_numbers_between_do_not_matter(parse, difference, edits):
    traced = parse(edited(ATTENTION, ("int64[3] merge", "float half = {0.5}, int64[3] merge"), *edits))
    make_linear(traced)
    before = traced.copy()
    assert merge_projections(traced).fired == 1
    assert stacked_layers(traced) == [("q", "k", "v")]
    assert difference(before, traced) <= 1e-12


def test_a_projection_in_another_format_is_a_near_miss(parse):
    traced = parse(edited(ATTENTION, (V, "v = Linear<rows = 24, bits = 3, cols = 24>(x)")))
    make_linear(traced)
    result = merge_projections(traced)
    assert stacked_layers(traced) == [("q", "k")]
    assert [(each.node, each.reason) for each in result.skipped] == [
        ("v", "another projection reads the same, in another format or width of activations")
    ]
