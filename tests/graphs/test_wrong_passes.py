"""Passes of the pipeline, each with one fault put in: the proof after each pass (`lrq_export.proof`) finds every one.

A fault is a small function that replaces a part of the real pass. It runs on the graph that the passes before it made,
all of which are proved without the fault first, so that the fault is what is refused.
"""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from graph_texts import ATTENTION, edited

from graphs.passes import PIPELINE, Pass
from graphs.passes.channels import RULES, _Climb
from graphs.passes.norms import Norm
from graphs.traced import Signs, TracedGraph
from lrq_export import evaluate
from lrq_export.errors import CheckFailed
from lrq_export.models.base import InputSpec
from lrq_export.proof import Proof
from lrq_export.rewrite import Outcome, rewrite

BOUND = 1e-6  # gates.parity_nmse of a recipe that says nothing else
STEPS: dict[str, Pass] = {step.__name__: step for step in PIPELINE}


def module(step: str):
    """The module of a pass; in its package the name is that of the function."""
    return sys.modules[STEPS[step].__module__]


# Queries and keys are rotated alike, values otherwise. The heads are 12 wide, and H of 12 is not symmetric.
ATTEND = edited(
    ATTENTION,
    ("24] x)", "24] x, float[samples, 1, 24] condition)"),
    ("int64[3] merge", "float half = {0.5}, int64[3] merge"),
    *(
        (
            f"{name} = Linear<rows = 24, cols = 24>(x)",
            f"r{name} = Rotate<block = 12, seed = {seed}>(x) {name} = Linear<rows = 24, cols = 24>(r{name})",
        )
        for name, seed in {"q": 1, "k": 1, "v": 2}.items()
    ),
    (
        "y = Linear<rows = 24, cols = 24>(merged)",
        """scaled = Mul(merged, half)
        rotated = Rotate<block = 12, seed = 7>(scaled)
        o = Linear<rows = 24, cols = 24>(rotated)
        gate = Kept<rows = 24, cols = 24>(condition)
        gated = Mul(gate, o)
        y = Add(gated, x)""",
    ),
).replace("batch", "samples")
# Text and image tokens attend to each other.
JOINT = edited(
    ATTENTION,
    ("24] x)", "24] x, float[batch, text, 24] c)"),
    ("(float[batch, tokens, 24] y)", "(float[batch, both, 24] y)"),
    *(
        (
            f"{name}4 = Reshape({name}, split)",
            f"t{name} = Linear<rows = 24, cols = 24>(c) {name}c = Concat<axis = 1>(t{name}, {name}) "
            f"{name}4 = Reshape({name}c, split)",
        )
        for name in "qkv"
    ),
    ("y = Linear<rows = 24, cols = 24>(merged)", "r = Rotate<block = 12>(merged) y = Linear<rows = 24, cols = 24>(r)"),
).replace("batch", "samples")
# Attention and feed-forward side by side: channels of two sources, equalized together.
PARALLEL = """
parallel (float[samples, tokens, 24] x) => (float[samples, tokens, 24] y)
{
    a = Relu(x)
    wide = Linear<rows = 48, cols = 24>(x)
    b = Gelu(wide)
    both = Concat<axis = -1>(a, b)
    rotated = Rotate<block = 12, width = 72, equalized = 4>(both)
    y = Linear<rows = 24, cols = 72>(rotated)
}
"""
# adaLN-Zero around a GEGLU.
FEED_FORWARD = f"""
feed_forward (float[samples, tokens, 24] x, float[samples, 1, 24] condition) => (float[samples, tokens, 24] y)
<float one = {{1}}, float[24] ones = {{{", ".join(["1"] * 24)}}}>
{{
    modulation = Kept<rows = 72, cols = 24>(condition)
    scale, shift, gate = Split<axis = -1, num_outputs = 3>(modulation)
    unit = LayerNormalization<epsilon = 0.01>(x, ones)
    factor = Add(scale, one)
    scaled = Mul(unit, factor)
    n = Add(scaled, shift)
    ru = Rotate<block = 12, seed = 3>(n)
    u = Linear<rows = 48, cols = 24>(ru)
    hidden, gated = Split<axis = -1, num_outputs = 2>(u)
    active = Gelu(gated)
    g = Mul(hidden, active)
    rg = Rotate<block = 8>(g)
    d = Linear<rows = 24, cols = 24>(rg)
    dg = Mul(d, gate)
    y = Add(x, dg)
}}
"""
# Where both kinds of GELU are small, they differ in the second digit.
TAIL = """
tail (float[samples, tokens, 24] x) => (float[samples, tokens, 24] y)
<float low = {-2}>
{
    positive = Abs(x)
    a = Sub(low, positive)
    g = Gelu<approximate = "tanh">(a)
    r = Rotate<block = 12>(g)
    y = Linear<rows = 24, cols = 24, bias = 0>(r)
}
"""
TWICE = """
twice (float[samples, tokens, 24] x) => (float[samples, tokens, 24] y)
{
    one = Rotate<block = 12>(x)
    two = Rotate<block = 12>(one)
    y = Linear<rows = 24, cols = 24>(two)
}
"""
NETWORKS = {
    "attention": ATTEND,
    "attention, blocks that straddle heads": edited(ATTEND, ("block = 12, seed = 7", "block = 24, seed = 7")),
    "attention, equalized": edited(ATTEND, ("block = 12, seed = 7", "block = 12, equalized = 7")),
    "joint attention": JOINT,
    "parallel": PARALLEL,
    "feed-forward": FEED_FORWARD,
    "feed-forward, the gate first": edited(FEED_FORWARD, ("hidden, gated = Split", "gated, hidden = Split")),
    "feed-forward, equalized alone": edited(FEED_FORWARD, ("block = 12, seed = 3", "block = 1, equalized = 3")),
    "tail of the GELU": TAIL,
    "rotated twice": TWICE,
}  # fmt: skip


@dataclass(frozen=True)
class Proved:
    """A network's way through the pipeline: the graph before each pass, and what the pass did."""

    proof: Proof
    before: dict[str, TracedGraph]
    outcomes: list[Outcome]


@pytest.fixture(scope="module")
def proved(parse):
    """Network -> Proved, each made once."""
    made: dict[str, Proved] = {}

    def prove(network: str) -> Proved:
        if network not in made:
            made[network] = _prove(parse(NETWORKS[network]))
        return made[network]

    return prove


def _prove(traced: TracedGraph) -> Proved:
    specs = {tensor.name: InputSpec(tuple(tensor.shape)) for tensor in traced.model_inputs()}
    sizes, generator = {"samples": 2, "tokens": 6, "text": 9}, torch.Generator().manual_seed(5)
    recorded = {
        # Small enough for the epsilon of a norm to count.
        name: torch.randn([sizes.get(size, size) for size in spec.shape], generator=generator) * 0.3
        for name, spec in specs.items()
    }
    proof, graphs, outcomes = Proof(specs, recorded, read=None), [traced], []

    def done(graph: TracedGraph, outcome: Outcome) -> None:
        graphs.append(graph)
        outcomes.append(outcome)

    rewrite(traced, PIPELINE, proof, BOUND, done=done)
    return Proved(proof, dict(zip(STEPS, graphs, strict=False)), outcomes)


@pytest.mark.parametrize("network", NETWORKS)
def test_without_a_fault_every_pass_is_proved(proved, network):
    outcomes = proved(network).outcomes
    assert [outcome.name for outcome in outcomes] == list(STEPS)
    assert not any(outcome.refused for outcome in outcomes)
    fired = [outcome for outcome in outcomes if outcome.result.fired]
    assert fired
    assert all(outcome.nmse <= 1e-10 for outcome in fired)


def transposed(monkeypatch):
    """W' = R W in place of Rᵀ W."""
    right = evaluate.rotation_of

    def wrong(step, width):
        rotation = right(step, width)
        back = SimpleNamespace(apply=rotation.apply_inverse)
        return back if isinstance(step, evaluate.RotateOutput) else rotation

    monkeypatch.setattr(evaluate, "rotation_of", wrong)


def bias_missed(monkeypatch):
    fold = module("fold_rotation_into_producer")
    right = fold.rows_behind

    def wrong(tensor, block, traced):
        return [rows for rows in right(tensor, block, traced) if rows.name in traced.linears]

    monkeypatch.setattr(fold, "rows_behind", wrong)


def equalizer_missed(monkeypatch):
    fold = module("fold_rotation_into_producer")
    monkeypatch.setattr(fold, "replace", lambda step, **changes: replace(step, equalizer=None, **changes))


def one_of_two_values(monkeypatch):
    monkeypatch.setitem(RULES, "Concat", lambda climb, node, tensor, axes: climb.up(node.inputs[0], axes))


def heads_straddled(monkeypatch):
    monkeypatch.setattr(_Climb, "check_head", lambda climb, width: None)


def signs_lost(monkeypatch):
    """A rotation that moves leaves its signs behind."""
    commute = module("commute_rotation")
    right = commute._rotate

    def wrong(x, rotation, traced, *others):
        node = right(x, rotation, traced, *others)
        traced.signs["ones"] = Signs()
        node.inputs[1] = gs.Constant("ones", np.ones(24, np.float32))
        return node

    monkeypatch.setattr(commute, "_rotate", wrong)


def number_lost(monkeypatch):
    """x R in place of c (x R)."""
    commute = module("commute_rotation")
    right = commute._past

    def wrong(node, operand, rotation, traced):
        moved = right(node, operand, rotation, traced)
        commute.redirect_readers(node.outputs[0], node.inputs[operand])
        return moved

    monkeypatch.setattr(commute, "_past", wrong)


def first_divisors_for_all(monkeypatch):
    """Each part of a Concat gets the factors of as many channels from the first one on."""
    commute = module("commute_rotation")
    right = commute._signs_part
    monkeypatch.setattr(
        commute, "_signs_part",
        lambda constant, signs, start, stop, traced: right(constant, signs, 0, stop - start, traced),
    )  # fmt: skip


def signs_ignored(monkeypatch):
    """Rotations of one block count as equal."""
    monkeypatch.setattr(module("share_rotation"), "rotation_key", lambda node: node.attrs["block"])


def no_inverse_cancelled(monkeypatch):
    monkeypatch.setattr(module("cancel_rotations"), "_check", lambda first, second, traced: None)


def query_and_key_swapped(monkeypatch):
    merge = module("merge_projections")
    right = merge._merge

    def wrong(siblings, traced):
        right(siblings, traced)
        split = traced.graph.nodes[-1]
        query, key, *others = split.outputs
        split.outputs = [key, query, *others]

    monkeypatch.setattr(merge, "_merge", wrong)


def bias_lost(monkeypatch):
    """A layer's bias taken for none."""
    make = module("make_linear")
    right = make.open_linear
    monkeypatch.setattr(make, "open_linear", lambda matmul, graph: replace(right(matmul, graph), bias=None))


def half_is_neutral(monkeypatch):
    """x where the graph says 0.5 x."""
    monkeypatch.setitem(module("dead_code").NEUTRAL, "Mul", 0.5)


def changed_norm(monkeypatch, step, **changes):
    """The pass finds every norm with these changes."""
    right = module(step).modulated_norm

    def wrong(tensor) -> Norm | None:
        norm = right(tensor)
        return norm and replace(norm, **{name: change(norm) for name, change in changes.items()})

    monkeypatch.setattr(module(step), "modulated_norm", wrong)


def epsilon_dropped(monkeypatch):
    changed_norm(monkeypatch, "fuse_modulated_norm", epsilon=lambda norm: 0.0)


def usual_epsilon(monkeypatch):
    changed_norm(monkeypatch, "fuse_modulated_norm", epsilon=lambda norm: 1e-6)


def mean_kept(monkeypatch):
    changed_norm(monkeypatch, "fuse_modulated_norm", kind=lambda norm: "RMSNorm")


def one_missed(monkeypatch):
    """scale in place of 1 + scale."""
    changed_norm(monkeypatch, "fuse_modulated_norm", scale=lambda norm: norm.scale.inputs[0].inputs[0])


def shift_missed(monkeypatch):
    changed_norm(monkeypatch, "fuse_modulated_norm", shift=lambda norm: None)


def shift_not_multiplied(monkeypatch):
    smoothing = module("fold_smoothing")
    right = smoothing._check
    monkeypatch.setattr(smoothing, "_check", lambda *arguments: right(*arguments)[:1])


def halves_swapped(monkeypatch):
    """GEGLU whose first half is the gate taken for the usual one."""
    fuse = module("fuse_activation")
    right = fuse._halves
    monkeypatch.setattr(fuse, "_halves", lambda hidden, gate: gate and right(gate, hidden))


def exact_for_tanh(monkeypatch):
    monkeypatch.setattr(
        module("fuse_activation"), "activation", lambda tensor: ("GeluRotate", tensor.inputs[0].inputs[0])
    )


def fused_wrongly(monkeypatch, change):
    """`change` is made to every product that has an epilogue."""
    fuse = module("fuse_epilogue")
    right = fuse._fuse

    def wrong(linear, traced):
        fired = right(linear, traced)
        if fired:
            change(linear, traced.graph)
        return fired

    monkeypatch.setattr(fuse, "_fuse", wrong)


def gate_missed(monkeypatch):
    def ungated(linear, graph):
        *others, gate, residual = linear.inputs
        linear.inputs = [*others, gs.Constant(f"{gate.name}.ones", np.ones(24, np.float32)), residual]

    fused_wrongly(monkeypatch, ungated)


def residual_twice(monkeypatch):
    """The Add stays behind the product that has the residual already."""

    def add_again(linear, graph):
        (y,) = linear.outputs
        once = gs.Variable("once", y.dtype, y.shape)
        linear.outputs = [once]
        graph.nodes.append(gs.Node("Add", "again", {}, [once, linear.inputs[-1]], [y]))

    fused_wrongly(monkeypatch, add_again)


# The fault, the pass that has it and the network where it shows.
FAULTS = [
    (half_is_neutral, "dead_code", "attention"),
    (signs_lost, "commute_rotation", "attention"),
    (number_lost, "commute_rotation", "attention"),
    (first_divisors_for_all, "commute_rotation", "parallel"),
    (signs_ignored, "share_rotation", "attention"),
    (no_inverse_cancelled, "cancel_rotations", "rotated twice"),
    (transposed, "fold_rotation_into_producer", "attention"),
    (transposed, "fold_rotation_into_producer", "joint attention"),
    (bias_missed, "fold_rotation_into_producer", "attention"),
    (equalizer_missed, "fold_rotation_into_producer", "attention, equalized"),
    (one_of_two_values, "fold_rotation_into_producer", "joint attention"),
    (heads_straddled, "fold_rotation_into_producer", "attention, blocks that straddle heads"),
    (shift_not_multiplied, "fold_smoothing", "feed-forward, equalized alone"),
    (bias_lost, "make_linear", "attention"),
    (query_and_key_swapped, "merge_projections", "attention"),
    (epsilon_dropped, "fuse_modulated_norm", "feed-forward"),
    (usual_epsilon, "fuse_modulated_norm", "feed-forward"),
    (mean_kept, "fuse_modulated_norm", "feed-forward"),
    (one_missed, "fuse_modulated_norm", "feed-forward"),
    (shift_missed, "fuse_modulated_norm", "feed-forward"),
    (halves_swapped, "fuse_activation", "feed-forward, the gate first"),
    (exact_for_tanh, "fuse_activation", "tail of the GELU"),
    (gate_missed, "fuse_epilogue", "feed-forward"),
    (residual_twice, "fuse_epilogue", "attention"),
]


@pytest.mark.parametrize(("fault", "step", "network"), FAULTS, ids=lambda each: getattr(each, "__name__", each))
def test_a_fault_is_refused_by_name_and_leaves_the_graph_as_it_was(proved, monkeypatch, fault, step, network):
    before, proof, kept = proved(network).before[step], proved(network).proof, []
    was = before.to_onnx()
    fault(monkeypatch)
    with pytest.raises(
        CheckFailed, match=rf"rewrite: pass {step}: its answers: NMSE .* needed at most .*e-(0[789]|1\d)"
    ):
        rewrite(before, [STEPS[step]], proof, BOUND)
    after = rewrite(
        before, [STEPS[step]], proof, BOUND, keep_going=True, done=lambda graph, outcome: kept.append((graph, outcome))
    )
    ((graph, outcome),) = kept
    assert (outcome.name, outcome.result.fired, outcome.nmse) == (step, 0, None)
    assert outcome.refused.startswith("its answers: NMSE")
    assert graph is after
    assert after.to_onnx() == was
