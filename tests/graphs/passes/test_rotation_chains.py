"""Properties of the pipeline where rotations follow rotations, which no trace writes: random graphs, 24 channels wide.

What a layer reads is rotated by several nodes here, moved, scaled and joined between them, and read more than once.
"""

import random

import pytest
from graph_structure import disguise, structure
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphs.checks import check
from graphs.passes import PIPELINE

STEPS = (  # of `{y}` from `{x}`, and `{z}` from further up
    *(f"{{y}} = Rotate<block = {block}{seed}>({{x}})" for block in (4, 8, 12) for seed in ("", ", seed = 1")),
    "{y} = Mul({x}, half)",
    "{y} = Reshape({x}, shape)",
    "{y} = Linear<rows = 24, cols = 24>({x})",
    "{y} = Concat<axis = 1>({x}, {z})",
)
# Which step is next, how far up what it reads is, and how far up the other tensor that it joins.
CHAINS = st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(1, 2), st.integers(1, 4)), max_size=9)
# 0 and 2: blocks of 4 and 8 without signs; the second undoes the first, and equal rotations are left.
UNDONE = [(7, 1, 1), (0, 1, 1), (2, 2, 1), (0, 2, 1), (6, 2, 1), (2, 2, 1)]


def network(chain: list[tuple[int, int, int]]) -> str:
    """The steps one after the other, and a layer behind every tensor that nothing else reads."""
    tensors, unread, body = ["x"], {"x"}, []
    for step, nearest, other in chain:
        x, z = (tensors[-min(back, len(tensors))] for back in (nearest, other))
        tensors.append(f"t{len(tensors)}")
        body.append(STEPS[step].format(x=x, y=tensors[-1], z=z))
        unread -= {x, z} if "{z}" in STEPS[step] else {x}
        unread.add(tensors[-1])
    ends = sorted(unread)
    layers = [f"y{place} = Linear<rows = 24, cols = 24>({end})" for place, end in enumerate(ends)]
    outputs = ", ".join(f"float[batch, n{place}, 24] y{place}" for place in range(len(ends)))
    return f"""chain (float[batch, tokens, 24] x) => ({outputs}) <float half = {{0.5}}, int64[3] shape = {{0, 0, 24}}>
    {{ {" ".join([*body, *layers])} }}"""


def rewrite(traced) -> dict[str, int]:
    fired = {}
    for step in PIPELINE:
        fired[step.__name__] = step(traced).fired
        check(traced)
    return fired


@given(CHAINS)
@example(UNDONE)
@settings(max_examples=40, deadline=None)
def test_a_second_run_changes_nothing(parse, chain):
    traced = parse(network(chain))
    rewrite(traced)
    before = structure(traced)
    assert set(rewrite(traced).values()) == {0}
    assert structure(traced) == before


@given(CHAINS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_neither_names_nor_node_order_matter(parse, chain, rng):
    traced = parse(network(chain))
    disguised = traced.copy()
    disguise(disguised.graph, rng)
    assert rewrite(traced) == rewrite(disguised)
    assert structure(traced) == structure(disguised)


@given(CHAINS)
@settings(max_examples=20, deadline=None)
def test_the_function_stays(parse, difference, chain):
    traced = parse(network(chain))
    before = traced.copy()
    rewrite(traced)
    assert difference(before, traced) <= 1e-11


@pytest.mark.parametrize("seed", range(3))
def test_a_rotation_put_into_a_chain_changes_the_function(parse, difference, seed):
    """The twin that must fail: a rotation that no layer's weight knows of."""
    chain = [(6, 1, 1), (0, 1, 1), (7, 1, 1)]
    more = [*chain[:2], (random.Random(seed).choice([2, 4]), 1, 1), chain[2]]
    assert difference(parse(network(chain)), parse(network(more))) > 1e-3
