"""Which rotations are left to be computed while the model runs, and how much work that is.

A rotation counts in the block of the layers that read it. Its work is that of the fast transform, in additions and
multiplications for one token: for each of its channels the factor, m butterflies and K additions, block = K · 2^m. That
of a layer is 2 · rows · cols; products of attention are left out, so shares are of the linear layers alone.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs

from graphs.passes.channels import NoMatch
from graphs.passes.norms import modulated_norm
from graphs.passes.patterns import (
    LINEAR_OPS,
    ROTATE_OPS,
    is_lrq,
    is_standard,
    keeps_channels,
    layer_weight,
    producer,
    scaled_operand,
)
from graphs.traced import TracedGraph


def online_channels(x: gs.Tensor, traced: TracedGraph) -> tuple[int, int]:
    """The channels, from a first to the one behind the last, on the last axis of `x` that nodes rotate; (0, 0): none.

    Factors that a norm was given in its scale (`fold_smoothing`) count as rotated: no weight holds them. Raises
    ValueError where others lie between those that are rotated, and where that differs from token to token.
    """
    node = producer(x)
    if node is None:
        return 0, 0
    if is_lrq(node, *ROTATE_OPS) or _is_scaled_norm(x, traced):
        return 0, x.shape[-1]
    if (moved := _moved(node)) is not None:
        return online_channels(moved, traced)
    if not is_standard(node, "Concat"):
        return 0, 0
    parts = [online_channels(each, traced) for each in node.inputs]
    if node.attrs["axis"] % len(x.shape) != len(x.shape) - 1:
        if len(set(parts)) > 1:
            raise ValueError(f"{x.name}: some of the tokens are rotated and others are not")
        return parts[0]
    starts = np.cumsum([0, *(each.shape[-1] for each in node.inputs)]).tolist()
    rotated = [(at + first, at + stop) for at, (first, stop) in zip(starts, parts, strict=False) if stop]
    if any(before[1] != after[0] for before, after in pairwise(rotated)):
        raise ValueError(f"{x.name}: unrotated channels lie between rotated ones")
    return (rotated[0][0], rotated[-1][1]) if rotated else (0, 0)


def _moved(node: gs.Node) -> gs.Tensor | None:
    """What a node reads that moves, cuts or scales whole tokens, as those do that `commute_rotation` passes by."""
    if not is_standard(node, "Transpose", "Mul", "Div", "Reshape", "Split", "Slice"):
        return None
    if node.op in ("Mul", "Div"):
        operand = scaled_operand(node)
        return None if operand is None else node.inputs[operand]
    x, (y, *_) = node.inputs[0], node.outputs
    if node.op in ("Reshape", "Transpose"):
        return x if keeps_channels(node) else None
    return x if x.shape and y.shape and x.shape[-1] == y.shape[-1] else None


def _is_scaled_norm(x: gs.Tensor, traced: TracedGraph) -> bool:
    try:
        norm = modulated_norm(x)
    except NoMatch:
        return False
    product = None if norm is None or norm.scale is None else producer(norm.scale)
    return product is not None and any(each.name in traced.signs for each in product.inputs)


@dataclass(frozen=True)
class BlockWork:
    """What a block of the model computes for one token of each of its streams."""

    rotations: int  # online
    fused: int  # of these, with the norm or activation before them
    rotation_work: int  # that of channels which are equalized alone, without a rotation, among it
    linear_work: int

    @property
    def share(self) -> float:
        """The work of rotations over all of it."""
        return self.rotation_work / (self.rotation_work + self.linear_work)


def work_by_block(traced: TracedGraph) -> dict[str, BlockWork]:
    """For every block, by its module path, its rotations and its work; layers outside of blocks are under ""."""
    rotations: dict[str, list[gs.Node]] = {}
    work: dict[str, int] = {}
    for node in traced.graph.nodes:
        if is_lrq(node, *ROTATE_OPS):
            readers = [weight for reader in _readers(node.outputs[0]) for weight in _layers(reader, traced)]
            rotations.setdefault(block_of(readers[0]) if readers else "", []).append(node)
        for layer, amount in _products(node, traced):
            work[block_of(layer)] = work.get(block_of(layer), 0) + amount
    return {
        block: BlockWork(
            len(found := [node for node in rotations.get(block, []) if node.attrs["block"] > 1]),
            sum(node.op != "HadamardRotate" for node in found),
            sum(map(rotation_work, rotations.get(block, []))),
            work.get(block, 0),
        )
        for block in sorted(work.keys() | rotations.keys(), key=_natural)
    }


def rotation_work(node: gs.Node) -> int:
    """Additions and multiplications of a rotation for one token."""
    base, block = int(node.attrs["base"]), int(node.attrs["block"])
    each = 1 + round(math.log2(block // base)) + (base if base > 1 else 0)
    return each * node.outputs[0].shape[-1]


def block_of(layer: str) -> str:
    """`transformer_blocks.0` of `transformer_blocks.0.attn1.to_q`; "" if the path has no number."""
    found = re.match(r"(.*?\.\d+)(\.|$)", layer)
    return found.group(1) if found else ""


def _readers(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The products that read a tensor, in parts or among others too."""
    for node in tensor.outputs:
        if is_standard(node, "Concat") or _moved(node) is not None:
            for each in node.outputs:
                yield from _readers(each)
        else:
            yield node


def _layers(node: gs.Node, traced: TracedGraph) -> list[str]:
    if is_lrq(node, *LINEAR_OPS):
        return [weight.layer for weight in traced.linear_parts(node.inputs[1].name)]
    weight = layer_weight(node.inputs[1])[:1] if is_standard(node, "MatMul") else []
    return [traced.linears[each.name].layer for each in weight if each.name in traced.linears]


def _products(node: gs.Node, traced: TracedGraph) -> Iterator[tuple[str, int]]:
    """Every quantized layer that a node multiplies with, and its work for one token."""
    for layer in _layers(node, traced):
        rows, cols = traced.linears[f"{layer}.codes"].weight.shape
        yield layer, 2 * rows * cols


def _natural(path: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
