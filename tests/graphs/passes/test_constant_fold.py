import graph_texts
import pytest
from onnx.printer import to_text

from graphs.checks import check, check_preserved
from graphs.passes import constant_fold

CONSTANTS = f"""
constants (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
<float[24] a = {{{", ".join(map(str, range(24)))}}}, float two = {{2}}>
{{
    half = Reciprocal(two)
    factors = Mul(a, half)
    scaled = Mul(x, factors)
    y = Linear<rows = 24, cols = 24>(scaled)
}}
"""


def test_constants_are_computed_ahead(parse, difference):
    traced = parse(CONSTANTS)
    before = traced.copy()
    assert constant_fold(traced).fired == 2
    assert traced.graph.nodes[0].inputs[1].values.tolist() == [i / 2 for i in range(24)]
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) <= 1e-11
    assert constant_fold(traced).fired == 0


def test_what_depends_on_an_input_or_a_weight_is_not_computed_ahead(parse):
    traced = parse(CONSTANTS.replace("24] x)", "24] x, float two)").replace(", float two = {2}", ""))
    before = traced.to_onnx()
    assert constant_fold(traced).fired == 0
    assert traced.to_onnx() == before


def test_an_lrq_node_stays_even_if_its_input_is_constant(parse):
    text = (
        "g (float[batch, 24] x) => (float[batch, 24] y) <float[24] a = {%s}> { r = Rotate<block = 8>(a) y = Add(x, r) }"
    )
    traced = parse(text % ", ".join(["1"] * 24))
    assert constant_fold(traced).fired == 0
    assert [node.op for node in traced.graph.nodes] == ["HadamardRotate", "Add"]


def test_what_would_be_large_is_left_and_said(parse):
    """A constant of more than a megabyte from a few bytes: the file would hold it."""
    text = graph_texts.edited(
        CONSTANTS,
        ("two = {2}", "two = {2}, int64[2] wide = {20000, 24}"),
        ("tokens, 24] y)", "tokens, 24] y, float[20000, 24] many)"),
        ("factors =", "many = Expand(a, wide) factors ="),
    )
    traced = parse(text)
    result = constant_fold(traced)
    assert any(reason.startswith("Expand of constants is larger than 1048576 bytes") for reason in result.reasons())
    assert "Expand" in [node.op for node in traced.graph.nodes]


HALF_OF_A_SIZE = """
sizes (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y, int64[1] half)
<float[1] h = {0.5}>
{
    size = Shape<start = 1, end = 2>(x)
    number = Cast<to = 1>(size)
    few = Mul(number, h)
    half = Cast<to = 7>(few)
    scaled = Mul(x, h)
    y = Linear<rows = 24, cols = 24>(scaled)
}
"""


def test_fractions_of_a_size_stay_fractions(parse, difference):
    """onnx-graphsurgeon's own folding would take 0.5 for 0, here and in the Mul that also reads it."""
    traced = parse(HALF_OF_A_SIZE)
    before = traced.to_onnx()
    assert constant_fold(traced).fired == 0
    check(traced)
    assert traced.to_onnx() == before


KNOWN = """
known (float[batch, 6, 24] x) => (float[batch, 6, 24] y, int64[2] shape, int64 tokens, int64[3] all, int64[2] part)
<int64[2] last = {1, 2}, int64 one = {1}>
{
    sizes = Shape(x)
    found = Gather(sizes, last)
    shape = Identity(found)
    size = Gather<axis = -1>(sizes, one)
    tokens = Identity(size)
    all = Identity(sizes)
    known = Shape<start = 1>(x)
    part = Identity(known)
    flat = Reshape(x, sizes)
    y = Linear<rows = 24, cols = 24>(flat)
}
"""


def test_known_sizes_are_constants_and_others_stay(parse, difference):
    traced = parse(KNOWN)
    before = traced.copy()
    assert constant_fold(traced).fired >= 2
    check(traced)
    check_preserved(before, traced)
    assert difference(before, traced) == 0
    outputs = dict(zip(["y", "shape", "tokens", "all", "part"], traced.graph.outputs, strict=True))
    inputs = {name: outputs[name].inputs[0].inputs[0] for name in ("shape", "tokens", "all", "part")}
    assert inputs["shape"].values.tolist() == inputs["part"].values.tolist() == [6, 24]
    assert inputs["tokens"].values.tolist() == 6
    assert inputs["all"].inputs[0].op == "Shape"  # the batch is free


@pytest.mark.parametrize("step", ["sizes = Shape(x)", "all = Shape(x) sizes = Gather(all, last)"])
def test_a_known_size_that_is_an_output_keeps_what_computes_it(parse, step):
    text = f"g (float[6, 24] x) => (float[6, 24] y, int64[2] sizes) <int64[2] last = {{0, 1}}> {{ y = Relu(x) {step} }}"
    traced = parse(text)
    constant_fold(traced)
    check(traced)
    (sizes,) = [each for each in traced.graph.outputs if each.name == "sizes"]
    assert sizes.inputs


COMPUTED = """
computed (float[batch, 6, 24] x) => (float[samples, 24] y)
<int64[1] minus = {-1}>
{
    place = Constant<value = int64[1] {2}>()
    sizes = Shape(x)
    width = Gather(sizes, place)
    rows = Concat<axis = 0>(minus, width)
    flat = Reshape(x, rows)
    y = Linear<rows = 24, cols = 24>(flat)
}
"""


def test_sizes_picked_by_a_computed_index_are_constants_at_once(parse, difference):
    traced = parse(COMPUTED)
    before = traced.copy()
    assert constant_fold(traced).fired >= 3
    assert not {"Shape", "Gather", "Concat"} & {node.op for node in traced.graph.nodes}
    assert constant_fold(traced).fired == 0
    check(traced)
    assert difference(before, traced) == 0


def test_what_is_drawn_at_random_stays_random(parse):
    traced = parse(CONSTANTS.replace("half = Reciprocal(two)", "half = RandomNormalLike(two)"))
    assert constant_fold(traced).fired == 0


SLICED = """
sliced (float[batch, 6, 24] x) => (float[batch, 6, 24] y, int64[k] part)
<int64[1] start = {%d}, int64[1] stop = {%d}, int64[1] zero = {0}, int64[1] step = {%d}>
{
    sizes = Shape(x)
    cut = Slice(sizes, start, stop%s)
    part = Identity(cut)
    y = Linear<rows = 24, cols = 24>(x)
}
"""


@pytest.mark.parametrize(
    ("bounds", "part"),
    [
        ((-1, 2**63 - 1, 1, ""), [24]),
        ((1, 9, 1, ", zero"), [6, 24]),
        ((-1, 0, -1, ", zero, step"), [24, 6]),
        ((0, 2, 1, ""), None),  # the batch is free
    ],
)
def test_a_slice_of_known_sizes_is_a_constant(parse, bounds, part):
    traced = parse(SLICED % bounds)
    assert constant_fold(traced).fired == (part is not None)
    cut = traced.graph.outputs[1].inputs[0].inputs[0]
    assert (cut.inputs[0].op == "Slice") if part is None else (cut.values.tolist() == part)


def test_a_branch_is_left_as_it_is(parse):
    text = """
    branch (float[batch, 24] x) => (float[batch, 24] y) <bool yes = {1}>
    {
        y = If(yes) <then_branch = a () => (float[batch, 24] t) { s = Relu(x) t = Neg(s) },
                     else_branch = b () => (float[batch, 24] e) { e = Abs(x) }>
    }"""
    traced = parse(text)
    assert constant_fold(traced).fired == 0
    assert [node.op for node in traced.graph.nodes] == ["If"]


NO_KNOWN_SIZES = {  # what a Gather, Slice or Shape reads that no size is known of, and the shape of y
    "tokens, not their sizes": (
        "some = Slice(x, nought, one, one) few = Gather<axis = 1>(some, last) y = Abs(few)", "a, b, c"),
    "sizes of which one is free": ("sizes = Shape(x) some = Gather(sizes, both) y = ConstantOfShape(some)", "a, b"),
    "a cut that is fed": ("sizes = Shape(x) some = Slice(sizes, fed, three) y = Reshape(x, some)", "a, b, c"),
    "a tensor of unknown rank": ("any = Reshape(x, shape) some = Shape(any) y = Reshape(x, some)", "a, b, c"),
}  # fmt: skip


@pytest.mark.parametrize(("steps", "shape"), NO_KNOWN_SIZES.values(), ids=NO_KNOWN_SIZES.keys())
def test_what_no_size_is_known_of_stays_and_is_no_near_miss(parse, steps, shape):
    traced = parse(f"""
        g (float[batch, 6, 24] x, int64[1] fed, int64[n] shape) => (float[{shape}] y)
        <int64[1] nought = {{0}}, int64[1] one = {{1}}, int64[1] three = {{3}}, int64[1] last = {{0}},
         int64[2] both = {{0, 1}}>
        {{ {steps} }}
    """)
    before = to_text(traced.to_onnx())
    result = constant_fold(traced)
    assert (result.fired, result.skipped) == (0, [])
    assert to_text(traced.to_onnx()) == before


def test_neither_random_numbers_nor_rotated_or_equalized_constants_are_near_misses(parse):
    """The first read nothing, the others stay for good: `graphs.online` finds equalized channels by their factors."""
    traced = parse(f"""
        g (float[batch, 24] x) => (float[batch, 24] y) <float[24] a = {{{", ".join(["2"] * 24)}}}>
        {{
            drawn = RandomNormal<shape = [24]>()
            e = Rotate<block = 1, equalized = 1>(x)
            r = Rotate<block = 8>(a)
            s = Add(e, r)
            f = Mul(a, signs24_e1)
            g = Add(drawn, f)
            y = Add(s, g)
        }}
    """)
    result = constant_fold(traced)
    assert (result.fired, result.skipped) == (0, [])
    assert {"RandomNormal", "Mul"} <= {node.op for node in traced.graph.nodes}
