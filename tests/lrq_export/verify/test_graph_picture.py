"""Pictures of one block: which nodes are its own, what is drawn of them, and where."""

import re
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest
from conftest import parse  # noqa: F401 - the shorthand of tests/graphs

from graphs.passes import make_linear, merge_projections, share_rotation
from graphs.traced import TracedGraph
from lrq_export.verify.block_graph import FUSED, INPUT, LINEAR, ROTATION, STANDARD, block_graph, repeated_blocks
from lrq_export.verify.graph_picture import COLOURS, TALLEST, Layout, draw, show_blocks
from lrq_export.verify.report_page import render_report_page

HEAD = """
model (float[batch, tokens, 24] x0) => (float[batch, tokens, 24] y)
<int64[4] split = {0, 0, 2, 12}, int64[3] merge = {0, 0, 24}, float half = {0.5},
 float[24] ones = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
"""
EMBED = "x1 = Kept<rows = 24, cols = 24>(x0)"
# Two underscores stand for a dot: names in ONNX text have none. @ is the block, < what it reads, > what it computes.
ATTENTION = """
    normed@ = LayerNormalization<axis = -1>(<, ones)
    rq@ = Rotate<block = 12>(normed@)
    rk@ = Rotate<block = 12>(normed@)
    rv@ = Rotate<block = 12>(normed@)
    @__to_q = Linear<rows = 24, cols = 24>(rq@)
    @__to_k = Linear<rows = 24, cols = 24>(rk@)
    @__to_v = Linear<rows = 24, cols = 24>(rv@)
    q4@ = Reshape(@__to_q, split)
    k4@ = Reshape(@__to_k, split)
    v4@ = Reshape(@__to_v, split)
    qh@ = Transpose<perm = [0, 2, 1, 3]>(q4@)
    kh@ = Transpose<perm = [0, 2, 3, 1]>(k4@)
    vh@ = Transpose<perm = [0, 2, 1, 3]>(v4@)
    qs@ = Mul(qh@, half)
    scores@ = MatMul(qs@, kh@)
    p@ = Softmax(scores@)
    mixed@ = MatMul(p@, vh@)
    back@ = Transpose<perm = [0, 2, 1, 3]>(mixed@)
    merged@ = Reshape(back@, merge)
    ro@ = Rotate<block = 24>(merged@)
    @__to_out = Linear<rows = 24, cols = 24>(ro@)
    > = Add(@__to_out, <)
"""
MLP = """
    wide@ = Rotate<block = 24>(<)
    @__up = Linear<rows = 48, cols = 24>(wide@)
    act@ = Gelu(@__up)
    @__down = Kept<rows = 24, cols = 48>(act@)
    > = Add(@__down, <)
"""
LAST = "y = Kept<rows = 24, cols = 24>(@)"


def _text(*blocks, last=LAST):
    """A model of named blocks, each a (name, text), one after the other."""
    lines = [EMBED]
    for number, (name, text) in enumerate(blocks, 1):
        filled = re.sub(r"(?<= )<(?=[,)])|(?<=\()<(?=[,)])", f"x{number}", text).replace("@", name)
        lines.append(re.sub(r"^ +>", f"    x{number + 1}", filled, flags=re.MULTILINE))
    return f"{HEAD}{{\n" + "\n".join(lines) + f"\n{last.replace('@', f'x{len(blocks) + 1}')}\n}}"


def _dotted(name):
    return name.replace("__", ".").replace("_bias", ".bias").replace("_weight", ".weight")


@pytest.fixture(scope="module")
def model(parse):  # noqa: F811
    """Blocks -> their model, its layers named by dotted module paths."""

    def make(*blocks, last=LAST, name=_dotted):
        traced = parse(_text(*blocks, last=last))
        for tensor in traced.graph.tensors().values():
            tensor.name = name(tensor.name)
        linears = {name(codes): replace(weight, layer=name(weight.layer)) for codes, weight in traced.linears.items()}
        tensors = {name(key): value for key, value in traced.tensors.items()}
        return TracedGraph(traced.graph, linears, tensors, traced.signs)

    return make


@pytest.fixture(scope="module")
def attention(model):
    return model(("blocks__0", ATTENTION), ("blocks__1", ATTENTION))


def _rewritten(traced):
    after = traced.copy()
    for step in (share_rotation, make_linear, merge_projections):
        assert step(after).fired
    return after


def _svg(traced, prefix):
    layout = Layout(block_graph(traced, prefix))
    return draw(layout, layout.width)


def _drawn(graph):
    return [(box.kind, box.title, box.detail) for box in graph.boxes]


def _edges(graph):
    """Edges by the titles of their ends, the numbers of equal titles left out."""
    return {(graph.boxes[start].title, graph.boxes[end].title) for start, end in graph.edges}


def test_a_block_is_drawn_as_its_rotations_linear_layers_and_what_is_between(attention):
    graph = block_graph(attention, "blocks.0.")
    linears = [(LINEAR, f"Linear {name}", "4-bit, 24 → 24") for name in ("to_q", "to_k", "to_v")]
    turned = (ROTATION, "Rotate", "24 channels by 12")
    assert _drawn(graph) == [
        (INPUT, "x1", ""),
        (STANDARD, "LayerNormalization", ""),
        turned, turned, turned,
        *linears,
        (STANDARD, "Attention", ""),
        (ROTATION, "Rotate", "24 channels"),
        (LINEAR, "Linear to_out", "4-bit, 24 → 24"),
        (STANDARD, "Add", ""),
        ("output", "output of the block", ""),
    ]  # fmt: skip
    # A norm, 4 rotations, 4 layers of 4 nodes, 3 + 2 reshapes and as many transposes without 2, scale, 3 of the
    # attention, and the residual.
    assert (graph.rotations, graph.fused_rotations, graph.linears, graph.nodes) == (4, 0, 4, 1 + 4 + 16 + 8 + 1 + 3 + 1)


def test_the_residual_goes_round_and_the_norm_leads_in(attention):
    edges = _edges(block_graph(attention, "blocks.0."))
    assert {("x1", "Add"), ("x1", "LayerNormalization"), ("Linear to_out", "Add"), ("Rotate", "Linear to_q")} <= edges
    assert ("Add", "output of the block") in edges
    assert ("LayerNormalization", "Linear to_q") not in edges


def test_an_input_is_named_after_the_block_or_layer_that_made_it(attention):
    assert block_graph(attention, "blocks.1.").boxes[0].title == "blocks.0"


def test_equal_blocks_are_drawn_alike_and_share_no_node(model):
    traced = model(*((f"blocks__{i}", ATTENTION) for i in range(3)))
    graphs = [block_graph(traced, f"blocks.{i}.") for i in range(3)]
    assert _drawn(graphs[0])[1:] == _drawn(graphs[1])[1:]
    # The last residual is read by the last layer alone, so it leads into that one.
    assert graphs[2].nodes == graphs[0].nodes - 1
    assert sum(graph.nodes for graph in graphs) + 3 + 1 + 3 == len(traced.graph.nodes)


def test_after_the_passes_fewer_boxes_are_left(attention):
    graph = block_graph(_rewritten(attention), "blocks.0.")
    assert (graph.rotations, graph.linears) == (2, 2)
    assert (LINEAR, "Linear to_q+to_k+to_v", "4-bit, 24 → 72") in _drawn(graph)
    assert sum(box.kind == ROTATION for box in graph.boxes) == 2


def test_weights_kept_in_floating_point_are_linear_layers_of_another_colour(model):
    traced = model(("blocks__0", MLP), ("blocks__1", MLP))
    drawn = _drawn(block_graph(traced, "blocks.0."))
    assert (STANDARD, "Linear down", "floating point, 48 → 24") in drawn
    assert (LINEAR, "Linear up", "4-bit, 24 → 48") in drawn


def test_fused_nodes_have_a_colour_of_their_own(attention):
    after = _rewritten(attention)
    rotations = [node for node in after.graph.nodes if node.op == "HadamardRotate"]
    outputs = [node for node in after.graph.nodes if "blocks.0.to_out.codes" in {each.name for each in node.inputs}]
    added = next(node for node in after.graph.nodes if node.op == "Add" and node.outputs[0].name == "x2")
    rotations[0].op, outputs[0].op = "LayerNormRotate", "Int8LinearResidual"
    added.op, added.domain = "ScaledResidual", "lrq"
    graph = block_graph(after, "blocks.0.")
    fused = [(box.title, box.detail) for box in graph.boxes if box.kind == FUSED]
    assert fused == [
        ("Layer Norm Rotate", "24 channels by 12"),
        ("Linear to_out + residual", "4-bit, 24 → 24"),
        ("Scaled Residual", ""),
    ]
    assert (graph.rotations, graph.fused_rotations, graph.linears) == (2, 1, 2)
    assert _svg(after, "blocks.0.").count(f'fill="{COLOURS[FUSED][0]}"') == 3


def test_what_the_last_layer_computes_of_a_block_s_tensor_is_not_the_block_s(model):
    """DiT modulates its last projection by what its first block makes of the timestep."""
    last = "late = Kept<rows = 24, cols = 24>(blocks__0__up_open)\n y = Add(late, @)"
    narrow = MLP.replace("rows = 48", "rows = 24").replace("cols = 48", "cols = 24")
    plain = block_graph(model(("blocks__0", narrow), ("blocks__1", narrow)), "blocks.0.")
    reading = block_graph(model(("blocks__0", narrow), ("blocks__1", narrow), last=last), "blocks.0.")
    assert reading.nodes == plain.nodes
    assert not any(box.title == "Linear late" for box in reading.boxes)


def test_one_block_of_each_kind_in_the_order_of_the_graph(model):
    blocks = [("outer__0", ATTENTION), ("outer__1", ATTENTION), ("inner__0", MLP), ("inner__1", MLP)]
    assert repeated_blocks(model(*blocks)) == ["outer.0.", "inner.0."]


def test_a_first_block_that_is_like_no_other_is_passed_over(model):
    blocks = [("blocks__0", MLP), ("blocks__1", ATTENTION), ("blocks__2", ATTENTION)]
    assert repeated_blocks(model(*blocks)) == ["blocks.1."]


@pytest.mark.parametrize("blocks", [[("blocks__0", MLP)], [("first", MLP), ("second", MLP)], []])
def test_without_repeated_blocks_there_is_no_picture(model, blocks):
    traced = model(*blocks)
    assert repeated_blocks(traced) == []
    assert show_blocks(traced, traced) is None


def test_the_picture_is_xml_with_one_group_per_box(attention):
    root = ElementTree.fromstring(_svg(attention, "blocks.0."))
    kinds = [group.get("class") for group in root.iter("g") if group.get("class")]
    assert kinds == [box.kind for box in block_graph(attention, "blocks.0.").boxes]
    fills = [group.find("rect").get("fill") for group in root.iter("g") if group.get("class") == ROTATION]
    assert fills == [COLOURS[ROTATION][0]] * 4
    assert len(list(root.iter("path"))) == len(block_graph(attention, "blocks.0.").edges)
    assert len({COLOURS[kind][0] for kind in (ROTATION, FUSED, LINEAR)}) == 3


def test_names_of_layers_stay_text(model):
    hostile = "\"><script>alert('x')</script>&amp;"
    traced = model(
        ("blocks__0", MLP), ("blocks__1", MLP), name=lambda name: _dotted(name).replace(".up", f".{hostile}up")
    )  # fmt: skip
    svg = _svg(traced, "blocks.0.")
    assert "<script" not in svg
    whole = [title.text for title in ElementTree.fromstring(svg).iter("title")]
    assert whole == [f"Linear {hostile}up"]  # too long for its box, which shows both ends


def test_equal_graphs_give_equal_bytes(model, attention):
    again = model(("blocks__0", ATTENTION), ("blocks__1", ATTENTION))
    read = TracedGraph.from_onnx(attention.to_onnx())
    assert _svg(again, "blocks.0.") == _svg(attention, "blocks.0.") == _svg(read, "blocks.0.")


@pytest.mark.parametrize("text", [ATTENTION, MLP])
def test_nothing_overlaps_and_every_edge_goes_down(model, text):
    layout = Layout(block_graph(model(("blocks__0", text), ("blocks__1", text)), "blocks.0."))
    for row in layout.rows:
        for one, other in combinations([layout.placed[item] for item in row], 2):
            assert abs(one.x - other.x) >= (one.width + other.width) / 2
    for course in layout.courses:
        heights = [layout.placed[item].y for item in course]
        assert heights == sorted(set(heights))
    assert all(each.x - each.width / 2 >= 0 and each.x + each.width / 2 <= layout.width for each in layout.placed)


@pytest.fixture(scope="module")
def deep(model):
    """More levels in a block than Python may recurse, and a residual round all of them."""
    chain = "\n".join(f"    c{i}@ = Relu({f'c{i - 1}@' if i else '@__up'})" for i in range(1500))
    text = MLP.replace("act@ = Gelu(@__up)", chain.strip()).replace("(act@)", "(c1499@)")
    return model(("blocks__0", text), ("blocks__1", text))


def test_a_deep_block_is_drawn(deep):
    graph = block_graph(deep, "blocks.0.")
    assert sum(box.title == "Relu" for box in graph.boxes) == 1500
    assert "<svg" in _svg(deep, "blocks.0.")


def test_tall_pictures_wait_folded(deep, attention):
    assert Layout(block_graph(attention, "blocks.0.")).height < TALLEST
    assert "<details" in show_blocks(deep, deep)
    assert "<details" not in show_blocks(attention, attention)


def test_the_report_page_shows_both_graphs(attention, structure_of, fetched_by):
    page = render_report_page({}, None, (attention, _rewritten(attention)))
    section = re.search(r'<section id="blocks">.*?</section>', page, flags=re.DOTALL)[0]
    assert section.count("<svg") == 2
    before, after = (re.sub("<[^>]+>", "", line) for line in re.findall(r"<p>(<b>.*?)</p>", section))
    assert before == "4 online rotations, 4 linear layers, 34 nodes"
    assert after.startswith("2 online rotations, 2 linear layers, ")
    assert section.count(f'fill="{COLOURS[ROTATION][0]}"') == 4 + 2
    assert "fused" not in section  # the legend names what is drawn
    structure = structure_of(page)
    assert len(structure.ids) == len(set(structure.ids))
    assert fetched_by(page) == []


def test_a_page_without_graphs_says_so():
    section = re.search(r'<section id="blocks">.*?</section>', render_report_page({}, None), flags=re.DOTALL)[0]
    assert "No graphs were handed to this page" in section
    assert "<svg" not in section
