"""Move rotations up, towards what computes their input, past whatever leaves channels apart.

    HadamardRotate(c x)               ->  c HadamardRotate(x)             c one number; also x / c
    HadamardRotate(Reshape(x))        ->  Reshape(HadamardRotate(x))      channels last before and after; also Transpose
    HadamardRotate(parts of Split(x)) ->  Split(HadamardRotate(x))        all parts, of tokens; also Slices of x
    HadamardRotate(Concat(a, b))      ->  Concat(HadamardRotate(a), HadamardRotate(b))      of channels
    Concat(HadamardRotate(a), HadamardRotate(b))  ->  HadamardRotate(Concat(a, b))          of tokens, equal rotations

So image and text tokens that leave one attention are rotated before they part, where the rotation can fold; and where
attention and feed-forward run side by side, each gets its own part of the rotation. Where several equal rotations read
what is passed, they become one, and where one meets the rotation that it undoes, both go.
"""

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from graphs import equalizer
from graphs.passes.cancel_rotations import cancel
from graphs.passes.channels import NoMatch, rows_behind
from graphs.passes.fuse_activation import activation
from graphs.passes.patterns import (
    is_graph_output,
    is_inner,
    is_lrq,
    is_standard,
    keeps_channels,
    producer,
    redirect_readers,
    remove_node,
    rotation_key,
    scaled_operand,
    value_readers,
)
from graphs.passes.result import PassResult
from graphs.traced import Signs, TracedGraph


def commute_rotation(traced: TracedGraph) -> PassResult:
    """`fired` counts the rotations that are no longer where they were, however far each has moved."""
    result, before, reasons = PassResult(), _rotations(traced), {}
    # First all that meet, then all that join: what becomes of them does not depend on the order of nodes.
    while _any(cancel, traced, {}) or _any(_join, traced, reasons := {}) or _any(_move_up, traced, reasons):
        pass
    for rotation, reason in reasons.values():
        if not _folds(rotation, traced):  # which is better than to move
            result.skip(rotation, reason)
    result.fired = sum(not rotation.outputs for rotation in before)
    if result.fired:
        traced.forget_unused()
    return result


def _rotations(traced: TracedGraph) -> list[gs.Node]:
    return [node for node in traced.graph.nodes if is_lrq(node, "HadamardRotate")]


def _any(move: Callable, traced: TracedGraph, reasons: dict[int, tuple[gs.Node, str]]) -> bool:
    """Whether `move` changes any rotation of the graph, all of which it tries; `reasons` gets why others stay."""
    moved = False
    for rotation in _rotations(traced):
        try:
            moved |= bool(rotation.outputs and move(rotation, traced))  # it may be replaced with an equal one by now
        except NoMatch as reason:
            reasons[id(rotation)] = rotation, str(reason)
    return moved


def _move_up(rotation: gs.Node, traced: TracedGraph) -> list[gs.Node]:
    """Put a rotation above the node that computes its input; returns what it became there, [] if it stays."""
    node = producer(rotation.inputs[0])
    rule = UPWARDS.get(node.op) if node is not None and not node.domain else None
    return [] if rule is None else rule(node, rotation, traced)


def _past_number(node: gs.Node, rotation: gs.Node, traced: TracedGraph) -> list[gs.Node]:
    operand = _scaled(node)
    return [] if operand is None else _past(node, operand, rotation, traced)


def _past_layout(node: gs.Node, rotation: gs.Node, traced: TracedGraph) -> list[gs.Node]:
    if not keeps_channels(node):
        raise NoMatch(f"{node.op} does not keep the channels on the last axis")
    return _past(node, 0, rotation, traced)


def _scaled(node: gs.Node) -> int | None:
    """Which input a Mul or Div scales by one number; None if it does not, or that is a part of an activation."""
    if activation(node.outputs[0]) is not None:  # a Gelu that is written out: the two become one node
        return None
    return scaled_operand(node)


def _past(node: gs.Node, operand: int, rotation: gs.Node, traced: TracedGraph) -> list[gs.Node]:
    """Rotate what `node` reads instead of what it computes, if all readers of that rotate it alike."""
    equal = _rotations_of([node.outputs[0]], rotation, traced)
    moved = _rotate(node.inputs[operand], rotation, traced)
    node.inputs[operand] = moved.outputs[0]
    _remove(equal, traced.graph)
    return [moved]


def _past_parts(node: gs.Node, rotation: gs.Node, traced: TracedGraph) -> list[gs.Node]:
    """Above all the Splits and Slices of one tensor, if every part is rotated; one part alone would be less work."""
    whole = node.inputs[0]
    equal = _rotations_of_parts(node, rotation, traced)
    if not equal:
        return []
    cutters = value_readers(whole)
    moved = _rotate(whole, rotation, traced)
    for each in cutters:
        each.inputs[0] = moved.outputs[0]
    _remove(equal, traced.graph)
    return [moved]


def _rotations_of_parts(node: gs.Node, rotation: gs.Node, traced: TracedGraph) -> list[gs.Node]:
    """The rotations of all parts of what `node` divides, equal to `rotation`, if there are two parts at least."""
    whole = node.inputs[0]
    cutters = value_readers(whole)
    if any(is_inner(each, traced.graph) for each in cutters):
        raise NoMatch(f"what {node.op} divides is also read in a branch")
    if is_graph_output(whole, traced.graph):
        raise NoMatch(f"what {node.op} divides is an output of the graph")
    if not all(is_standard(each, "Split", "Slice") for each in cutters):
        raise NoMatch(f"what {node.op} divides is also read elsewhere")
    if not all(map(_parts_tokens, cutters)):
        raise NoMatch(f"its channels are divided, or axes that are not known: no {node.op} of tokens alone")
    outputs = [part for each in cutters for part in each.outputs]
    parts = [part for part in outputs if value_readers(part) or is_graph_output(part, traced.graph)]
    ends = [_below_layout(part, traced.graph) for part in parts]
    return _rotations_of(ends, rotation, traced) if len(parts) > 1 else []


def _parts_tokens(node: gs.Node | None) -> bool:
    """Whether a node is a Split or Slice of other axes than the last, known ones."""
    if not is_standard(node, "Split", "Slice") or not node.inputs[0].shape:
        return False
    rank = len(node.inputs[0].shape)
    if node.op == "Split":
        return node.attrs.get("axis", 0) % rank != rank - 1
    if len(node.inputs) < 4 or not isinstance(node.inputs[3], gs.Constant):
        return False
    return all(int(axis) % rank != rank - 1 for axis in node.inputs[3].values)


def _past_concat(node: gs.Node, rotation: gs.Node, traced: TracedGraph) -> list[gs.Node]:
    """A rotation of channels that several tensors bring together becomes one for each of them."""
    joined = node.outputs[0]
    if not joined.shape or node.attrs["axis"] % len(joined.shape) != len(joined.shape) - 1:
        return []
    widths, block = [each.shape[-1] if each.shape else None for each in node.inputs], int(rotation.attrs["block"])
    if not all(isinstance(width, int) and width % block == 0 for width in widths):
        raise NoMatch(f"blocks of {block} channels straddle the parts of a Concat, {widths} channels wide")
    equal, moved = _rotations_of([joined], rotation, traced), []
    signs = traced.signs[rotation.inputs[1].name]
    if signs.seed is not None:
        raise NoMatch("its signs are drawn for all channels of a Concat at once")
    for place, stop in enumerate(np.cumsum(widths).tolist()):
        part = _signs_part(rotation.inputs[1], signs, stop - widths[place], stop, traced)
        moved.append(_rotate(node.inputs[place], rotation, traced, f".{place}", part))
        node.inputs[place] = moved[-1].outputs[0]
    _remove(equal, traced.graph)
    return moved


def _signs_part(constant: gs.Constant, signs: Signs, start: int, stop: int, traced: TracedGraph) -> gs.Constant:
    """The factors of channels `start` to `stop`, entered into the table of signs."""
    name = f"{constant.name}.{start}-{stop}"
    if (held := traced.graph.tensors().get(name)) is not None:
        return held  # what read it may have gone since it was entered
    divisors = None if signs.equalizer is None else equalizer.part(signs.equalizer, start, stop)
    traced.signs[name] = Signs(None, divisors)
    return gs.Constant(name, constant.values[start:stop].copy())


def _join(rotation: gs.Node, traced: TracedGraph) -> list[gs.Node]:
    """Rotate tokens behind the Concat that joins them, unless one of the equal rotations before it can fold."""
    readers = value_readers(rotation.outputs[0])
    node = readers[0] if len(readers) == 1 and not is_inner(readers[0], traced.graph) else None
    if not is_standard(node, "Concat"):
        return []
    rank = len(rotation.outputs[0].shape or ())
    if not rank or node.attrs["axis"] % rank == rank - 1:
        return []
    rotations, key = [producer(each) for each in node.inputs], _known_key(rotation, traced)
    if not all(each is not None and is_lrq(each, "HadamardRotate") and rotation_key(each) == key for each in rotations):
        raise NoMatch("not all tokens that a Concat joins are rotated alike")
    if any(
        len(value_readers(each.outputs[0])) > 1 or is_graph_output(each.outputs[0], traced.graph) for each in rotations
    ):
        raise NoMatch("some of the rotated tokens that a Concat joins are also read elsewhere, or an output")
    if any(_folds(each, traced) for each in rotations):
        return []
    for place, each in enumerate(rotations):
        node.inputs[place] = each.inputs[0]
    (rotated,) = node.outputs
    node.outputs = [gs.Variable(f"{rotated.name}.joined", rotated.dtype, rotated.shape)]
    moved = _rotation_node(rotation, node.outputs[0], rotation.inputs[1], rotated)
    traced.graph.nodes.append(moved)
    _remove(rotations, traced.graph)
    return [moved]


def _folds(rotation: gs.Node, traced: TracedGraph) -> bool:
    """Whether a rotation can fold into weights where it is, or above the Split or Slices that hand it its tokens."""
    x, block = rotation.inputs[0], int(rotation.attrs["block"])
    try:
        return bool(rows_behind(x, block, traced))
    except NoMatch:
        node = producer(_above_layout(x))
    if not _parts_tokens(node):
        return False
    try:
        whole, parts = node.inputs[0], _rotations_of_parts(node, rotation, traced)
        return bool(parts) and bool(rows_behind(whole, block, traced, readers=len(value_readers(whole))))
    except NoMatch:
        return False


def _layout_operand(node: gs.Node | None) -> int | None:
    """Which input a node scales by a number or moves about, as a rotation may do before it; None if it does not."""
    if is_standard(node, "Mul", "Div"):
        return _scaled(node)
    return 0 if is_standard(node, "Reshape", "Transpose") and keeps_channels(node) else None


def _above_layout(x: gs.Tensor) -> gs.Tensor:
    """What a rotation of `x` would rotate once it has moved up past all numbers and layouts."""
    while (operand := _layout_operand(node := producer(x))) is not None:
        x = node.inputs[operand]
    return x


def _below_layout(x: gs.Tensor, graph: gs.Graph) -> gs.Tensor:
    """The other way round: from where a rotation would move up to `x`, which nothing else reads on the way."""
    while not is_graph_output(x, graph) and len(readers := value_readers(x)) == 1:
        if is_inner(readers[0], graph) or _layout_operand(readers[0]) is None:
            break
        (x,) = readers[0].outputs
    return x


def _rotations_of(tensors: list[gs.Tensor], rotation: gs.Node, traced: TracedGraph) -> list[gs.Node]:
    """The rotations equal to `rotation` that read the tensors; raises NoMatch if anything else reads one of them."""
    key, graph = _known_key(rotation, traced), traced.graph
    readers = [reader for tensor in tensors for reader in value_readers(tensor)]
    if any(is_graph_output(tensor, graph) for tensor in tensors):
        raise NoMatch("what it rotates is an output of the graph")
    if not all(is_lrq(each, "HadamardRotate") and rotation_key(each) == key for each in readers):
        raise NoMatch("what it rotates is also read elsewhere, or rotated in another way")
    if any(is_graph_output(each.outputs[0], graph) for each in readers):
        raise NoMatch("the rotated tensor is an output of the graph")
    return readers


def _known_key(rotation: gs.Node, traced: TracedGraph) -> tuple:
    """What makes another rotation equal to this one; raises NoMatch unless its signs are constants of the table."""
    if rotation.inputs[1].name not in traced.signs:
        raise NoMatch("its signs are not in the table of signs")
    return rotation_key(rotation)


def _rotate(x: gs.Tensor, rotation: gs.Node, traced: TracedGraph, suffix: str = "", signs=None) -> gs.Node:
    """A new node that rotates `x` as `rotation` does its input, with other signs perhaps."""
    rotated = gs.Variable(f"{x.name}.{rotation.outputs[0].name}{suffix}", x.dtype, x.shape)
    node = _rotation_node(rotation, x, rotation.inputs[1] if signs is None else signs, rotated)
    traced.graph.nodes.append(node)
    return node


def _rotation_node(like: gs.Node, x: gs.Tensor, signs: gs.Tensor, rotated: gs.Tensor) -> gs.Node:
    return gs.Node(like.op, f"rotate.{rotated.name}", dict(like.attrs), [x, signs], [rotated], domain=like.domain)


def _remove(rotations: list[gs.Node], graph: gs.Graph) -> None:
    """Their readers read what they rotated, which arrives rotated now."""
    for each in rotations:
        redirect_readers(each.outputs[0], each.inputs[0])
        remove_node(each, graph)


UPWARDS = {
    "Mul": _past_number,
    "Div": _past_number,
    "Reshape": _past_layout,
    "Transpose": _past_layout,
    "Split": _past_parts,
    "Slice": _past_parts,
    "Concat": _past_concat,
}
