from functools import partial

import pytest
from graph_texts import ATTENTION, edited

from graphs.online import BlockWork, block_of, online_channels, rotation_work, work_by_block
from graphs.ops.hadamard_rotate import rotation_attributes
from graphs.passes import PIPELINE, fold_smoothing

# Channels of two sources, each of which may be rotated, before one layer.
JOINED = """
joined (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    a = Relu(x)
    b = Abs(x)
    ra = Rotate<block = 12>(a)
    rb = Rotate<block = 12>(b)
    both = Concat<axis = -1>(ra, rb)
    y = Kept<rows = 24, cols = 48>(both)
}
"""
RA, RB, BOTH = "ra = Rotate<block = 12>(a)", "rb = Rotate<block = 12>(b)", "both = Concat<axis = -1>(ra, rb)"
ONE, THREE = ("cols = 48", "cols = 24"), ("cols = 48", "cols = 72")  # sources of 24 channels


joined = partial(edited, JOINED)
CHANNELS = {  # of `both`
    "all": (joined(), (0, 48)),
    "none": (joined((RA, "ra = Neg(a)"), (RB, "rb = Neg(b)")), (0, 0)),
    "the first": (joined((RB, "rb = Neg(b)")), (0, 24)),
    "the last": (joined((RA, "ra = Neg(a)")), (24, 48)),
    "a norm without weights": (
        joined((BOTH, "both = LayerNormalization(a, ones)"), ONE,
               ("{\n    a", f"<float[24] ones = {{{', '.join(['1'] * 24)}}}>\n{{\n    a")), (0, 0)),
    "equalized alone": (joined((RA, "ra = Neg(a)"), (RB, "rb = Rotate<block = 1, equalized = 2>(b)")), (24, 48)),
    "rotated after they are joined": (
        joined((RA, "ra = Neg(a)"), (RB, "rb = Neg(b) whole = Concat<axis = 2>(ra, rb)"),
               (BOTH, "both = Rotate<block = 12, width = 48>(whole)")), (0, 48)),
    "the second of three": (
        joined((RA, "ra = Neg(a)"), (BOTH, "both = Concat<axis = -1>(ra, rb, b)"), THREE), (24, 48)),
    "of a Concat of Concats": (
        joined((BOTH, "inner = Concat<axis = -1>(a, ra) both = Concat<axis = -1>(inner, rb)"), THREE),
        (24, 72)),
    "a part of a Concat of Concats": (
        joined((BOTH, "inner = Concat<axis = -1>(a, ra) both = Concat<axis = -1>(inner, b)"), THREE),
        (24, 48)),
    "joined tokens, all rotated": (
        joined((BOTH, "both = Concat<axis = 1>(ra, rb)"), ONE, ("tokens, 24] y", "all, 24] y")),
        (0, 24)),
    "joined tokens, none rotated": (
        joined((BOTH, "both = Concat<axis = 1>(a, b)"), ONE, ("tokens, 24] y", "all, 24] y")),
        (0, 0)),
    "some of the tokens": (
        joined((BOTH, "both, rest = Split<axis = 1, num_outputs = 2>(ra)"), ONE,
               ("tokens, 24] x", "8, 24] x"), ("tokens, 24] y", "4, 24] y")), (0, 24)),
    "moved and scaled tokens": (
        joined((BOTH, "half = Mul(two, ra) same = Div(half, two) turned = Transpose<perm = [1, 0, 2]>(same) "
                      "both = Reshape(turned, shape)"),
               ("{\n    a", "<float two = {2}, int64[3] shape = {0, 0, 24}>\n{\n    a"), ONE,
               ("[batch, tokens, 24] y", "[tokens, batch, 24] y")), (0, 24)),
    "a number over them": (
        joined((BOTH, "both = Div(two, ra)"), ("{\n    a", "<float two = {2}>\n{\n    a"), ONE), (0, 0)),
    "turned about": (
        joined((BOTH, "both = Transpose<perm = [0, 2, 1]>(ra)"), ("tokens, 24] x", "48, 24] x"),
               ("tokens, 24] y", "24, 24] y")), (0, 0)),
    "joined tokens, their axis counted from the last": (
        joined((BOTH, "both = Concat<axis = -2>(ra, rb)"), ONE, ("tokens, 24] y", "all, 24] y")), (0, 24)),
    "the first, their axis counted from the first": (
        joined((RB, "rb = Neg(b)"), (BOTH, "both = Concat<axis = 2>(ra, rb)")), (0, 24)),
    "a product of two": (joined((BOTH, "both = Mul(ra, rb)"), ONE), (0, 0)),
    "a sum of two": (joined((BOTH, "both = Add(ra, rb)"), ONE), (0, 0)),
    "axes that are reversed": (
        joined((BOTH, "both = Transpose(ra)"), ONE, ("[batch, tokens, 24] x", "[24, tokens, 24] x"),
               ("[batch, tokens, 24] y", "[24, tokens, 24] y")), (0, 0)),
    "pairs of tokens": (
        joined((BOTH, "both = Reshape(ra, pairs)"), ("{\n    a", "<int64[3] pairs = {0, -1, 48}>\n{\n    a"),
               ("batch, tokens, 24] x", "batch, 8, 24] x"), ("batch, tokens, 24] y", "batch, 4, 24] y")), (0, 0)),
    "a shape that is not known": (
        joined((BOTH, "both = Reshape(ra, s)"), ("24] x)", "24] x, int64[n] s)"), ONE), (0, 0)),
    "what had no known shape": (
        joined((BOTH, "any = Reshape(ra, s) both = Reshape(any, known)"), ("24] x)", "24] x, int64[n] s)"), ONE,
               ("{\n    a", "<int64[3] known = {2, 3, 24}>\n{\n    a"), ("batch, tokens, 24] y", "2, 3, 24] y")),
        (0, 0)),
    "an activation behind": (joined((BOTH, "both = Relu(ra)"), ONE), (0, 0)),
    "an input of the graph": (joined((BOTH, "both = Mul(x, two)"), ONE,
                                     ("{\n    a", "<float two = {2}>\n{\n    a")), (0, 0)),
}  # fmt: skip


def read_by_y(traced):
    """What the layer y multiplies with its weight."""
    (product,) = [node for node in traced.graph.nodes if node.op == "MatMul"]
    return product.inputs[0]


@pytest.mark.parametrize(("text", "channels"), CHANNELS.values(), ids=CHANNELS.keys())
def test_online_channels_are_those_that_nodes_rotate(parse, text, channels):
    traced = parse(text)
    assert online_channels(read_by_y(traced), traced) == channels


def test_an_input_of_the_graph_is_not_rotated(parse):
    traced = parse(JOINED)
    assert online_channels(traced.graph.inputs[0], traced) == (0, 0)


REFUSED = {
    "unrotated channels between": (
        joined((BOTH, "both = Concat<axis = -1>(ra, a, rb)"), THREE),
        "both: unrotated channels lie between rotated ones"),
    "unrotated channels inside of a part": (
        joined((BOTH, "inner = Concat<axis = -1>(ra, a) both = Concat<axis = -1>(inner, rb)"),
               THREE),
        "both: unrotated channels lie between rotated ones"),
    "tokens of which some are rotated": (
        joined((BOTH, "both = Concat<axis = 1>(ra, b)"), ONE, ("tokens, 24] y", "all, 24] y")),
        "both: some of the tokens are rotated and others are not"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_record_of_a_layer_could_say_is_refused(parse, text, message):
    traced = parse(text)
    with pytest.raises(ValueError, match=message):
        online_channels(read_by_y(traced), traced)


SMOOTHED = f"""
smoothed (float[batch, tokens, 24] x, float[batch, 1, 24] scale, float[batch, 1, 24] shift)
    => (float[batch, tokens, 24] y)
<float[24] ones = {{{", ".join(["1"] * 24)}}}, float[24] weight = {{{", ".join(["2"] * 24)}}}>
{{
    unit = LayerNormalization(x, ones)
    scaled = Mul(unit, scale)
    n = Add(scaled, shift)
    r = Rotate<block = 1, equalized = 3>(n)
    y = Kept<rows = 24, cols = 24>(r)
}}
"""
AFFINE = edited(
    SMOOTHED, ("LayerNormalization(x, ones)", "LayerNormalization(x, weight)"), ("(n)", "(unit)"),
    ("scaled = Mul(unit, scale)", ""), ("n = Add(scaled, shift)", ""),
)  # fmt: skip


@pytest.mark.parametrize("text", [SMOOTHED, AFFINE], ids=["modulated", "affine"])
def test_factors_that_a_norm_was_given_count_as_online(parse, text):
    traced = parse(text)
    assert fold_smoothing(traced).fired == 1
    assert online_channels(read_by_y(traced), traced) == (0, 24)


@pytest.mark.parametrize("text", [SMOOTHED, AFFINE], ids=["modulated", "affine"])
def test_a_norm_without_such_factors_does_not(parse, text):
    traced = parse(edited(text, ("<block = 1, equalized = 3>", "<block = 12>")))
    x = read_by_y(traced).inputs[0].inputs[0]
    assert online_channels(x, traced) == (0, 0)


OTHER_NORMS = {
    "scaled by a product": (
        SMOOTHED,
        ("(unit, scale)", "(unit, more)"),
        ("scaled =", "more = Mul(scale, scale) scaled ="),
    ),
    "with weights of its own besides": (SMOOTHED, ("(x, ones)", "(x, weight)")),
}


@pytest.mark.parametrize(("text", "edits"), [(text, edits) for text, *edits in OTHER_NORMS.values()], ids=OTHER_NORMS)
def test_a_norm_that_is_scaled_otherwise_does_not(parse, text, edits):
    traced = parse(edited(text, *edits, ("r = Rotate<block = 1, equalized = 3>(n)", ""), ("(r)", "(n)")))
    assert online_channels(read_by_y(traced), traced) == (0, 0)


@pytest.mark.parametrize("name", ["Concat", "Transpose"])
def test_a_node_of_another_domain_computes_its_channels_anew(parse, name):
    traced = parse(joined() if name == "Concat" else joined((BOTH, "both = Transpose<perm = [1, 0, 2]>(ra)"), ONE))
    both = read_by_y(traced)
    assert online_channels(both, traced)[1]
    both.inputs[0].domain = "other"
    assert online_channels(both, traced) == (0, 0)


# (block, width) -> operations a token: for each channel the factor, m butterflies and K additions.
ROTATION_WORK = {
    (1, 24): 24 * 1,
    (8, 24): 24 * (1 + 3),
    (12, 24): 24 * (1 + 12),
    (24, 24): 24 * (1 + 1 + 12),
    (64, 128): 128 * (1 + 6),
    (1152, 1152): 1152 * (1 + 5 + 36),
}


@pytest.mark.parametrize(("block", "width"), ROTATION_WORK)
def test_the_work_of_a_rotation_is_that_of_the_fast_transform(parse, block, width):
    text = "g (float[batch, 24] x) => (float[batch, 24] y) { y = Rotate<block = B, width = 24>(x) }"
    traced = parse(text.replace("24", str(width)).replace("B", str(block)))
    (node,) = traced.graph.nodes
    assert node.attrs["block"] == rotation_attributes(block)["block"]
    assert rotation_work(node) == ROTATION_WORK[block, width]


# Two blocks and what surrounds them; in the second one, the output layer's rotation folds into v.
MLP = """
mlp (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    start = Kept<rows = 24, cols = 24>(x)
    r0 = Rotate<block = 12>(x)
    up = Linear<rows = 48, cols = 24>(r0)
    active = Gelu(up)
    r1 = Rotate<block = 8, width = 48>(active)
    down = Linear<rows = 24, cols = 48>(r1)
    rounded = Rotate<block = 24>(down)
    last = Linear<rows = 36, cols = 24>(rounded)
    end = Linear<rows = 24, cols = 36, act_bits = 16>(last)
    y = Add(start, end)
}
"""
LAYERS = {"up": "blocks.2.up", "down": "blocks.2.down", "last": "blocks.10.last", "end": "proj_out"}


def named(traced):
    """Module paths for the layers, as a trace has them; the shorthand has none with dots."""
    for short, path in LAYERS.items():
        weight = traced.linears.pop(f"{short}.codes")
        traced.linears[f"{path}.codes"] = type(weight)(**vars(weight) | {"layer": path})
    for tensor in traced.graph.inputs:
        short, _, role = tensor.name.rpartition(".")
        tensor.name = f"{LAYERS.get(short, short)}.{role}" if short else role
    return traced


WORK = {
    "": BlockWork(0, 0, 0, 2 * 24 * 36),
    "blocks.2": BlockWork(2, 0, 24 * 13 + 48 * 4, 2 * 48 * 24 + 2 * 24 * 48),
    "blocks.10": BlockWork(1, 0, 24 * 14, 2 * 36 * 24),
}


def test_work_is_counted_where_it_is_read(parse):
    traced = named(parse(MLP))
    assert work_by_block(traced) == WORK
    assert list(work_by_block(traced)) == ["", "blocks.2", "blocks.10"]
    assert WORK["blocks.2"].share == (24 * 13 + 48 * 4) / (24 * 13 + 48 * 4 + 4 * 48 * 24)


def test_folded_rotations_are_no_work_and_fused_ones_are(parse):
    """`rounded` folds into the layer before it; r1 and the GELU become one node."""
    traced = named(parse(MLP))
    for step in PIPELINE:
        step(traced)
    assert work_by_block(traced) == WORK | {
        "blocks.2": BlockWork(2, 1, 24 * 13 + 48 * 4, 2 * 48 * 24 + 2 * 24 * 48),
        "blocks.10": BlockWork(0, 0, 0, 2 * 36 * 24),
    }


def test_equalizing_alone_is_work_but_no_rotation(parse):
    traced = named(parse(edited(MLP, ("rounded = Rotate<block = 24>", "rounded = Rotate<block = 1, equalized = 1>"))))
    assert work_by_block(traced)["blocks.10"] == BlockWork(0, 0, 24, 2 * 36 * 24)


def test_merged_layers_are_each_counted(parse):
    text = edited(ATTENTION, ("q = L", "r = Rotate<block = 12>(x) q = L")).replace("cols = 24>(x)", "cols = 24>(r)")
    traced = parse(text)
    open_work = work_by_block(traced)
    for step in PIPELINE:
        step(traced)
    assert traced.stacks
    assert work_by_block(traced) == open_work == {"": BlockWork(1, 0, 24 * 13, 4 * 2 * 24 * 24)}


def test_a_rotation_of_parts_counts_where_the_parts_are_read(parse):
    text = edited(
        MLP,
        ("tokens, 24] x", "8, 24] x"), ("tokens, 24] y", "4, 24] y"), ("start = Kept<rows = 24, cols = 24>(x)", ""),
        ("up = Linear<rows = 48, cols = 24>(r0)",
         "one, two = Split<axis = 1, num_outputs = 2>(r0) up = Linear<rows = 48, cols = 24>(two)"),
        ("y = Add(start, end)", "y = Add(one, end)"),
    )  # fmt: skip
    assert work_by_block(named(parse(text))) == WORK


def test_a_rotation_of_tokens_that_are_joined_counts_where_all_are_read(parse):
    text = edited(
        MLP, ("tokens, 24] y", "both, 24] y"), ("y = Add(start, end)", "y = Neg(end)"),
        ("last = Linear<rows = 36, cols = 24>(rounded)",
         "both = Concat<axis = 1>(rounded, x) last = Linear<rows = 36, cols = 24>(both)"),
    )  # fmt: skip
    traced = named(parse(text))
    assert work_by_block(traced) == WORK
    (concat,) = [node for node in traced.graph.nodes if node.op == "Concat"]
    concat.domain = "other"  # computes something else of them
    assert work_by_block(traced)[""].rotations == 1


def test_a_rotation_that_no_layer_reads_counts_outside_of_blocks(parse):
    traced = named(parse(edited(MLP, ("y = Add(start, end)", "other = Rotate<block = 12>(x) y = Add(other, end)"))))
    assert work_by_block(traced)[""] == BlockWork(1, 0, 24 * 13, 2 * 24 * 36)


PATHS = {
    "transformer_blocks.2.attn1.to_q": "transformer_blocks.2",
    "transformer_blocks.12.ff.net.2": "transformer_blocks.12",
    "blocks.3": "blocks.3",
    "proj_out": "",
    "caption_projection.linear_1": "",
    "time_embed.2nd": "",
}


@pytest.mark.parametrize(("layer", "block"), PATHS.items())
def test_the_block_of_a_layer_is_its_path_up_to_the_first_number(layer, block):
    assert block_of(layer) == block
