"""Follow the channels of a tensor up to the weights that compute them.

A linear map of channels, which a rotation is, commutes with whatever leaves channels apart: moving tokens about,
scaling all by one number, joining tokens of two sources, and mixing tokens as attention does. So the map may be applied
to the weights at the top instead:

    Reshape, Transpose, Cast      channels may spread over several axes, (heads, width), as long as their order stays
    Mul or Div by a number        (x c) R = (x R) c
    Concat, Slice, Split          of tokens; a Split of channels leads on to a part of the rows of a weight
    Add of a bias                 (x + b) R = x R + b R
    MatMul(P, V), Attention       P mixes tokens, another one for each head: (P V) R = P (V R) if R stays within heads
    MatMul(x, Wᵀ)                 the end: x Wᵀ R = x (Rᵀ W)ᵀ

Every tensor on the way must have one reader: whoever else read it would find it rotated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from graphs.passes.patterns import is_graph_output, layer_weight, producer, scaled_operand, sole_consumer, value_readers
from graphs.traced import TracedGraph


class NoMatch(Exception):
    """The pattern of a pass does not hold here; the text says why."""


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a weight or bias, named as in the tables of a `TracedGraph` (codes for a weight)."""

    name: str
    start: int = 0
    stop: int | None = None  # None: to the last


def rows_behind(tensor: gs.Tensor, block: int, traced: TracedGraph, readers: int = 1) -> list[Rows]:
    """The weights and biases whose rows are the channels on the last axis of `tensor`, all of them in the same order.

    `block` neighbouring channels are to be mixed with each other, and so many `readers` of `tensor` want them mixed.
    Raises NoMatch with the reason.
    """
    return _Climb(block, traced).up(tensor, (len(tensor.shape or ()) - 1,), readers)


@dataclass(frozen=True)
class _Climb:
    block: int
    traced: TracedGraph
    first: int = 0  # the channel, of those now on the axes, with which the blocks begin

    def up(self, tensor: gs.Tensor, axes: tuple[int, ...], readers: int = 1) -> list[Rows]:
        """The rows behind the channels on `axes` of `tensor`, the first axis counting most."""
        node = producer(tensor)
        if not tensor.shape:
            raise NoMatch("what it rotates has no known shape")
        if node is None:
            fed = "a constant is" if isinstance(tensor, gs.Constant) else "an input of the graph is"
            raise NoMatch(f"{fed} what it rotates, no linear layer computes it")
        if len(value_readers(tensor)) > readers or is_graph_output(tensor, self.traced.graph):
            raise NoMatch(f"the output of {node.op} is also read elsewhere")
        rule = RULES.get(node.op) if not node.domain else None
        if rule is None:
            raise NoMatch(f"{node.op} computes what it rotates, no linear layer")
        return rule(self, node, tensor, axes)

    def keep(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        return self.up(node.inputs[0], axes)

    def cast(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        if node.inputs[0].dtype != tensor.dtype:
            raise NoMatch("Cast rounds what it rotates")
        return self.up(node.inputs[0], axes)

    def reshape(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        return self.up(node.inputs[0], _axes_before(node, axes))

    def transpose(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        perm = node.attrs.get("perm") or list(range(len(tensor.shape)))[::-1]
        return self.up(node.inputs[0], tuple(perm[axis] for axis in axes))

    def scale(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        operand = scaled_operand(node)
        if operand is None:
            raise NoMatch(f"{node.op} computes what it rotates, and not with one number for all channels")
        scaled = node.inputs[operand]
        if scaled.shape and len(scaled.shape) < len(tensor.shape):
            raise NoMatch(f"{node.op} adds axes to what it scales")
        return self.up(scaled, axes)

    def concat(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        if node.attrs["axis"] % len(tensor.shape) in axes:
            raise NoMatch("Concat joins channels of different layers")
        return [rows for each in node.inputs for rows in self.up(each, axes)]

    def slice(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        if len(node.inputs) < 4 or not isinstance(node.inputs[3], gs.Constant):
            raise NoMatch("Slice cuts along axes that are not known")
        if {int(axis) % len(tensor.shape) for axis in node.inputs[3].values} & set(axes):
            raise NoMatch("Slice takes some of the channels")
        return self.up(node.inputs[0], axes)

    def split(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        whole, axis = node.inputs[0], node.attrs.get("axis", 0) % len(tensor.shape)
        if axis not in axes:
            others = [each for each in node.outputs if each is not tensor]
            if any(each.outputs or is_graph_output(each, self.traced.graph) for each in others):
                raise NoMatch("Split hands other tokens to other readers")
            return self.up(whole, axes)
        if axes != (len(tensor.shape) - 1,):
            raise NoMatch("Split takes some of the heads")
        sizes = [each.shape[-1] if each.shape else None for each in node.outputs]
        place = next(index for index, each in enumerate(node.outputs) if each is tensor)
        if not all(isinstance(size, int) for size in sizes):
            raise NoMatch("Split makes parts of unknown sizes")
        start = sum(sizes[:place])
        rows = replace(self, first=self.first + start).up(whole, axes)
        if any(each.stop is not None for each in rows):
            raise NoMatch("Split takes a part of a part")
        return [Rows(each.name, start, start + sizes[place]) for each in rows]

    def add(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        biases = [each for each in node.inputs if not each.inputs and len(each.shape or ()) == 1]
        if len(biases) != 1 or axes != (len(tensor.shape) - 1,) or biases[0].shape[0] != tensor.shape[-1]:
            raise NoMatch("Add computes what it rotates, no linear layer")
        (bias,) = biases
        if bias.name not in self.traced.tensors or len(bias.outputs) != 1:
            raise NoMatch("the layer's bias is not a weight of its own")
        other = next(each for each in node.inputs if each is not bias)
        if other.shape and other.shape[-1] != tensor.shape[-1]:
            raise NoMatch("Add stretches what it rotates")
        return [*self.up(other, axes), Rows(bias.name)]

    def matmul(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        path = layer_weight(node.inputs[1])
        if not path:
            return self.mix(node.inputs[1], tensor, axes)
        if axes != (len(tensor.shape) - 1,):
            raise NoMatch("a linear layer computes it, but not its channels alone")
        if path[0].name not in self.traced.linears | self.traced.tensors:
            raise NoMatch("the weight of the linear layer before it is not in the tables of weights")
        if any(sole_consumer(each, self.traced.graph) is None for each in path):
            raise NoMatch("the weight of the linear layer before it is also read elsewhere")
        return [Rows(path[0].name)]

    def mix(self, values: gs.Tensor, mixed: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        """Tokens, the last axis but one, are mixed, by another matrix for every index of the axes before them."""
        rank = len(mixed.shape)
        if len(values.shape or ()) != rank or axes[-1] != rank - 1 or rank - 2 in axes:
            raise NoMatch("MatMul computes what it rotates, neither a linear layer nor a mix of tokens")
        if any(values.shape[axis] != mixed.shape[axis] for axis in axes):
            raise NoMatch("attention shares its values between heads")
        self.check_head(values.shape[-1])
        return self.up(values, axes)

    def attention(self, node: gs.Node, tensor: gs.Tensor, axes: tuple[int, ...]) -> list[Rows]:
        values, rank = node.inputs[2], len(tensor.shape)
        present = any(each.outputs or is_graph_output(each, self.traced.graph) for each in node.outputs[1:])
        if present or tensor is not node.outputs[0] or any(not each.is_empty() for each in node.inputs[4:]):
            raise NoMatch("Attention has keys and values of earlier calls, or is asked for them")
        if rank == 4:
            return self.mix(values, tensor, axes)
        if axes != (rank - 1,):
            raise NoMatch("Attention computes what it rotates, but not its channels alone")
        heads, width = node.attrs["kv_num_heads"], tensor.shape[-1]
        if heads != node.attrs["q_num_heads"]:
            raise NoMatch("Attention shares its values between heads")
        self.check_head(width // heads if isinstance(width, int) else None)
        return self.up(values, axes)

    def check_head(self, width) -> None:
        if not isinstance(width, int):
            raise NoMatch("the width of a head is not known")
        if width % self.block or self.first % self.block:
            at = f", from channel {self.first} on," if self.first else ""
            raise NoMatch(f"blocks of {self.block} channels{at} straddle heads of width {width}")


Rule = Callable[[_Climb, gs.Node, gs.Tensor, tuple[int, ...]], list[Rows]]
RULES: dict[str, Rule] = {
    "Identity": _Climb.keep,
    "Cast": _Climb.cast,
    "Reshape": _Climb.reshape,
    "Transpose": _Climb.transpose,
    "Mul": _Climb.scale,
    "Div": _Climb.scale,
    "Concat": _Climb.concat,
    "Slice": _Climb.slice,
    "Split": _Climb.split,
    "Add": _Climb.add,
    "MatMul": _Climb.matmul,
    "Attention": _Climb.attention,
}


def _axes_before(reshape: gs.Node, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a Reshape's input that hold what is on neighbouring `axes` of its output; row-major order stays."""
    before, after = reshape.inputs[0].shape or [], reshape.outputs[0].shape
    unknown = NoMatch(f"Reshape from {before or '?'} to {after} does not keep the channels together")
    if axes != tuple(range(axes[0], axes[-1] + 1)):
        raise unknown
    behind, width = after[axes[-1] + 1 :], [after[axis] for axis in axes]
    if not all(isinstance(size, int) for size in (*behind, *width)):
        raise unknown
    stop = _axis_at(before, len(before), math.prod(behind))
    start = None if stop is None else _axis_at(before, stop, math.prod(width))
    if start is None or start == stop:
        raise unknown
    return tuple(range(start, stop))


def _axis_at(shape, stop: int, elements: int) -> int | None:
    """The axis from which the sizes up to `stop` multiply to `elements`; None if there is none."""
    product, axis = 1, stop
    while product < elements and axis > 0 and isinstance(shape[axis - 1], int):
        axis -= 1
        product *= shape[axis]
    return axis if product == elements else None
