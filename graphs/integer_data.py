"""The integers that every quantized layer stands for, as its node decodes them: no pass may change a single one.

The proof in floating point (`graphs.float_model`) looks past codes, so a pass that told a node to read them otherwise
would get through. While passes run there are no codes yet. Each layer is therefore given random ones, drawn by its name
and format as its weight table has them, laid out in the type, layout and stack that its node declares, and decoded as
the attributes of the node say. What comes out is the same before and after a pass, bit for bit. That proves
`retype_codes` and `merge_projections`, and `prepack` by undoing it.

Rows are decoded independently of each other in every layout, so a few rows stand for all.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphs import names
from graphs.checks import GraphError
from graphs.ops import OPS, packing, words
from graphs.ops.codebook_dequant import CODEBOOK
from graphs.ops.int8_dequant import INT8
from graphs.ops.twin_log_dequant import TWIN_LOG
from graphs.ops.weight_format import WeightFormat
from graphs.passes.patterns import LINEAR_OF, LINEAR_OPS, RESIDUAL_OF, is_lrq
from graphs.traced import LinearWeight, TracedGraph

ROWS = 4  # of each layer; an even number, since rows of INT4 share a byte where columns are odd

_OF_DEQUANT = {"TwinLogDequant": TWIN_LOG, "CodebookDequant": CODEBOOK, "Int8Dequant": INT8}
FORMAT_OF: dict[str, WeightFormat] = {
    op: weight_format
    for dequant, weight_format in _OF_DEQUANT.items()
    for op in (dequant, LINEAR_OF[dequant], RESIDUAL_OF[LINEAR_OF[dequant]])
}


@dataclass(frozen=True)
class IntegerLayer:
    """What must stay of one layer: the bits of its activations, and its integer weights as they are decoded."""

    act_bits: int
    weight: np.ndarray  # (ROWS or fewer, cols) int8
    multiplied: bool = False  # as integers, wherever it is read: its activations are quantized, not only meant to be


def integer_layers(traced: TracedGraph) -> dict[str, IntegerLayer]:
    """Every quantized layer of the graph, by its name. Raises ValueError where a node cannot decode what it reads."""
    layers: dict[str, IntegerLayer] = {}
    for codes in [tensor for tensor in traced.graph.inputs if tensor.name in set(traced.codes_inputs())]:
        for node in codes.outputs:
            for weight, decoded in _decoded(traced, codes, node):
                now = IntegerLayer(weight.act_bits, decoded, is_lrq(node, *LINEAR_OPS))
                known = layers.setdefault(weight.layer, now)
                if not np.array_equal(known.weight, decoded):
                    raise ValueError(f"{node.op} {node.name!r} decodes {weight.layer} otherwise than another node does")
                if not now.multiplied:
                    layers[weight.layer] = now
    return layers


def check_same_integers(before: dict[str, IntegerLayer], after: dict[str, IntegerLayer]) -> None:
    """Raise GraphError for the first layer of `after` that is not as it was; layers may have gone."""
    for layer, now in after.items():
        where, was = f"the integer data of {layer}", before.get(layer)
        if was is None:
            raise GraphError(where, "there was no such layer", "those that the graph had")
        if now.act_bits != was.act_bits:
            raise GraphError(where, f"activations of {now.act_bits} bits", f"{was.act_bits} as before")
        if was.multiplied and not now.multiplied:
            raise GraphError(where, "its activations are left in floating point", "a product of integers as before")
        if now.weight.shape != was.weight.shape:
            raise GraphError(where, f"integers of shape {now.weight.shape}", f"{was.weight.shape} as before")
        wrong = np.argwhere(now.weight != was.weight)
        if len(wrong):
            row, col = (int(index) for index in wrong[0])
            raise GraphError(
                where, f"{len(wrong)} of {now.weight.size} integers differ, row {row} column {col} is "
                f"{now.weight[row, col]}", f"{was.weight[row, col]} as before"
            )  # fmt: skip


def _decoded(traced: TracedGraph, codes: gs.Tensor, node: gs.Node) -> Iterator[tuple[LinearWeight, np.ndarray]]:
    """The layers of one node that reads `codes`, a graph input, each with its integers."""
    weights = traced.linear_parts(codes.name)
    rows = [min(ROWS, weight.weight.shape[0]) for weight in weights]
    drawn = [_drawn(node, weight, count) for weight, count in zip(weights, rows, strict=True)]
    stored = [np.concatenate(role) for role in zip(*drawn, strict=True)]
    stored[0] = _laid_out(stored[0], node, codes)
    attributes = OPS[node.op].node_attributes(**node.attrs) | {"rows": sum(rows)}
    decoded = FORMAT_OF[node.op].decode([*stored, np.ones(sum(rows), np.float32)], attributes)
    yield from zip(weights, np.split(decoded, np.cumsum(rows)[:-1]), strict=True)


def _drawn(node: gs.Node, weight: LinearWeight, rows: int) -> Sequence[np.ndarray]:
    """Codes (rows, cols), not yet packed, and levels, if the format has any, by the weight table alone."""
    rng = np.random.default_rng(zlib.crc32(weight.layer.encode()))
    cols = weight.weight.shape[1]
    if weight.bits == names.INT8_BITS:
        return FORMAT_OF[node.op].example(rng, rows, cols).inputs
    packed, levels = FORMAT_OF[node.op].example(rng, weight.bits, rows, cols, weight.group_size).inputs
    return packing.unpack_elements(packed, weight.bits, cols), levels


def _laid_out(codes: np.ndarray, node: gs.Node, held: gs.Tensor) -> np.ndarray:
    """The codes as `node` declares that it reads them, in the type of the graph input that holds them."""
    if "bits" not in node.attrs:
        return codes
    bits = int(node.attrs["bits"])
    if node.attrs.get("layout", names.STORAGE) == names.WORDS:
        return words.prepack(codes, bits)
    return packing.typed_elements(packing.pack(codes, bits)).astype(held.dtype)
