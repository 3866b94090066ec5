"""Properties of the whole pipeline on random graphs of attentions and feed-forward layers, 24 channels wide."""

import random
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.checks import check, check_preserved
from graphs.passes import PIPELINE

SEEDS = st.sampled_from([None, 1, 2])
WIDTHS = {12: (12, 4, 2), 4: (4, 2), 24: (24, 12, 8)}  # of a head: blocks that fold


@dataclass(frozen=True)
class Block:
    """One residual block of the network, in ONNX text; its tensors begin with its name."""

    kind: str  # self, cross or mlp
    width: int  # of a head
    block: int  # of the rotation before the output projection
    seeds: tuple[int | None, int | None]  # of the rotations of the input and before the output projection
    bias: int
    bits: int

    def text(self, p: str, x: str, y: str) -> str:
        if self.kind == "mlp":
            hidden, out = self.linear(p + "a", x, 48), self.linear(p + "b", p + "g", 24)
            return f"{hidden} {p}g = Gelu({p}a) {out} {y} = Add({x}, {p}b)"
        source = "caption" if self.kind == "cross" else x
        seed = "" if self.seeds[1] is None else f", seed = {self.seeds[1]}"
        return f"""
            {self.linear(p + "q", x, 24)} {self.linear(p + "k", source, 24)} {self.linear(p + "v", source, 24)}
            {p}q4 = Reshape({p}q, split{self.width}) {p}k4 = Reshape({p}k, split{self.width})
            {p}v4 = Reshape({p}v, split{self.width}) {p}qh = Transpose<perm = [0, 2, 1, 3]>({p}q4)
            {p}kh = Transpose<perm = [0, 2, 3, 1]>({p}k4) {p}vh = Transpose<perm = [0, 2, 1, 3]>({p}v4)
            {p}scores = MatMul({p}qh, {p}kh) {p}p = Softmax({p}scores) {p}mixed = MatMul({p}p, {p}vh)
            {p}back = Transpose<perm = [0, 2, 1, 3]>({p}mixed) {p}merged = Reshape({p}back, merge)
            {p}rotated = Rotate<block = {self.block}{seed}>({p}merged)
            {p}o = Linear<rows = 24, cols = 24, bias = {self.bias}>({p}rotated) {y} = Add({x}, {p}o)
        """

    def linear(self, name: str, x: str, rows: int) -> str:
        cols = 48 if name.endswith("b") else 24
        seed = "" if self.seeds[0] is None else f", seed = {self.seeds[0]}"
        linear = f"{name} = Linear<rows = {rows}, cols = {cols}, bits = {self.bits}, bias = {self.bias}>({name}r)"
        return f"{name}r = Rotate<block = 12, width = {cols}{seed}>({x}) {linear}"

    @property
    def folds(self) -> int:
        return int(self.kind != "mlp" and self.width % self.block == 0)


@st.composite
def blocks(draw):
    width = draw(st.sampled_from(list(WIDTHS)))
    return Block(
        kind=draw(st.sampled_from(["self", "cross", "mlp"])),
        width=width,
        block=draw(st.sampled_from([*WIDTHS[width], 24])),  # 24 straddles the narrower heads
        seeds=(draw(SEEDS), draw(SEEDS)),
        bias=draw(st.integers(0, 1)),
        bits=draw(st.sampled_from([3, 4, 8])),
    )


NETWORKS = st.lists(blocks(), min_size=1, max_size=3)


def network(each: list[Block]) -> str:
    splits = ", ".join(f"int64[4] split{width} = {{0, 0, {24 // width}, {width}}}" for width in WIDTHS)
    body = "\n".join(block.text(f"b{i}_", f"x{i}", f"x{i + 1}") for i, block in enumerate(each))
    return f"""
        network (float[batch, tokens, 24] x0, float[batch, text, 24] caption) => (float[batch, tokens, 24] x{len(each)})
        <{splits}, int64[3] merge = {{0, 0, 24}}> {{ {body} }}
    """


def rewrite(traced) -> dict[str, int]:
    fired = {}
    for step in PIPELINE:
        before = traced.copy()
        fired[step.__name__] = step(traced).fired
        check(traced)
        check_preserved(before, traced)
    return fired


@given(NETWORKS)
@settings(max_examples=25, deadline=None)
def test_keeps_the_function_of_a_network_without_rotations(parse, difference, each):
    traced = parse(network(each))
    plain = parse(network(each).replace("Rotate<", "Plain<"))
    check(traced)
    assert difference(plain, traced) <= 1e-10
    fired = rewrite(traced)
    assert fired["fold_rotation_into_value"] == sum(block.folds for block in each)
    assert fired["make_linear"] == len(traced.linears)
    attends = [block for block in each if block.kind != "mlp"]
    assert fired["merge_projections"] == len(attends)
    assert difference(plain, traced) <= 1e-10


@given(NETWORKS)
@settings(max_examples=15, deadline=None)
def test_a_second_run_changes_nothing(parse, each):
    traced = parse(network(each))
    rewrite(traced)
    before = traced.to_onnx()
    assert set(rewrite(traced).values()) == {0}
    assert traced.to_onnx() == before


@given(NETWORKS, st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_neither_names_nor_node_order_matter(parse, each, rng):
    traced = parse(network(each))
    disguised = traced.copy()
    disguise(disguised.graph, rng)
    check(disguised)
    assert structure(traced) == structure(disguised)
    assert rewrite(traced) == rewrite(disguised)
    assert structure(traced) == structure(disguised)


@given(NETWORKS)
@settings(max_examples=10, deadline=None)
def test_the_result_does_not_depend_on_a_round_trip_through_onnx_between_passes(parse, each):
    straight, saved = parse(network(each)), parse(network(each))
    for step in PIPELINE:
        step(straight)
        saved = type(saved).from_onnx(saved.to_onnx())
        step(saved)
    assert structure(straight) == structure(saved)


def test_structure_tells_different_graphs_apart(parse):
    block = Block("self", 12, 12, (1, 2), 1, 4)
    one, other = parse(network([block])), parse(network([Block("self", 12, 12, (1, 1), 1, 4)]))
    assert structure(one) != structure(other)
    rewritten = one.copy()
    rewrite(rewritten)
    assert structure(one) != structure(rewritten)


def test_a_deep_network_in_any_order_goes_through(parse):
    """onnx-graphsurgeon's own topological sort exceeds the recursion limit here."""
    traced = parse(network([Block("self", 12, 12, (None, None), 1, 4)] * 40))
    disguise(traced.graph, random.Random(0))
    assert rewrite(traced)["fold_rotation_into_value"] == 40


def disguise(graph: gs.Graph, rng: random.Random) -> None:
    """Rename every node and inner tensor at random, and put the nodes in a random valid order."""
    outputs = {id(tensor) for tensor in graph.outputs}
    inner = [tensor for node in graph.nodes for tensor in node.outputs if id(tensor) not in outputs]
    for objects, prefix in ((graph.nodes, "node"), (inner, "tensor")):
        numbers = rng.sample(range(len(objects)), len(objects))
        for each, number in zip(objects, numbers, strict=True):
            each.name = f"{prefix}{number}"
    waiting, done, order = list(graph.nodes), set(), []
    while waiting:
        ready = [node for node in waiting if all(id(p) in done for tensor in node.inputs for p in tensor.inputs)]
        chosen = rng.choice(ready)
        waiting = [node for node in waiting if node is not chosen]
        done.add(id(chosen))
        order.append(chosen)
    graph.nodes = order


def structure(traced) -> tuple:
    """All of a graph but the names of nodes and inner tensors and the order of nodes: equal iff the graphs are."""
    weights = {codes: repr(weight) for codes, weight in traced.linears.items()}
    weights |= {name: repr(each) for name, each in traced.tensors.items()}
    weights |= {name: repr(parts) for name, parts in traced.stacks.items()}
    number: dict[tuple, int] = {}
    seen: dict[int, int] = {}

    def of(tensor: gs.Tensor) -> int:
        """A number for the computation that ends in the tensor, so that shared parts are described once."""
        if id(tensor) not in seen:
            if tensor.inputs:
                node = tensor.inputs[0]
                attributes = tuple(sorted((key, repr(value)) for key, value in node.attrs.items()))
                place = [output is tensor for output in node.outputs].index(True)
                key = (node.domain, node.op, attributes, place, *map(of, node.inputs))
            elif isinstance(tensor, gs.Constant):
                key = (tensor.values.tobytes(), tensor.values.shape)
            else:
                key = (tensor.name, weights.get(tensor.name))
            seen[id(tensor)] = number.setdefault(key, len(number))
        return seen[id(tensor)]

    outputs = tuple(map(of, traced.graph.outputs))
    return outputs, tuple(number), sorted(weights.items()), len(traced.graph.nodes)
