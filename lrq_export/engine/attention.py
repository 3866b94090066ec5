"""Replace decomposed attention by ONNX Runtime's MultiHeadAttention, which never holds the scores as a whole.

The exporter writes softmax(q kᵀ scale) v as a dozen nodes. For 16 heads of 1024 tokens its scores alone are 64 MiB a
sample, written and read several times: more traffic than all of a block's weights.
"""

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphs.passes.patterns import producer, sole_consumer

CONTRIB = "com.microsoft"
HEADS_FIRST = [0, 2, 1, 3]  # (batch, tokens, heads, width) <-> (batch, heads, tokens, width)


@dataclass(frozen=True)
class Attention:
    """One match: query, key, value (batch, tokens, heads · width) and the output of the same layout."""

    query: gs.Tensor
    key: gs.Tensor
    value: gs.Tensor
    heads: int
    scale: float
    last: gs.Node  # the Reshape whose output is the attention's


def fuse_attention(graph: gs.Graph) -> int:
    """Fuse every attention without a mask; returns how many.

    One with a mask stays as it is: MultiHeadAttention wants the mask repeated for every query, and a text of a hundred
    tokens has small scores.
    """
    found = [match_attention(node, graph) for node in graph.nodes if node.op == "Softmax"]
    for attention in filter(None, found):
        outputs = list(attention.last.outputs)
        attention.last.outputs.clear()
        graph.nodes.append(
            gs.Node(
                "MultiHeadAttention", f"{outputs[0].name}.attention",
                {"num_heads": attention.heads, "scale": attention.scale},
                [attention.query, attention.key, attention.value], outputs, domain=CONTRIB,
            )
        )  # fmt: skip
    return len([each for each in found if each is not None])


def match_attention(softmax: gs.Node, graph: gs.Graph) -> Attention | None:
    """The attention around `softmax`; None if other nodes than the exporter's are there, or a mask."""
    scores = _producer(softmax.inputs[0], "MatMul")
    mixed = _reader(softmax, graph, "MatMul")
    if scores is None or mixed is None or softmax.attrs.get("axis", -1) not in (-1, 3):
        return None
    query, query_scale = _scaled(scores.inputs[0])
    key, key_scale = _scaled(scores.inputs[1])
    sources = [_split_heads(query), _split_heads(_transposed(key)), _split_heads(mixed.inputs[1])]
    joined = _reader(mixed, graph, "Transpose")
    last = None if joined is None or joined.attrs["perm"] != HEADS_FIRST else _reader(joined, graph, "Reshape")
    if last is None or None in sources or len({heads for _, heads in sources}) != 1:
        return None
    (query, heads), (key, _), (value, _) = sources
    return Attention(query, key, value, heads, query_scale * key_scale, last)


def _producer(tensor: gs.Tensor | None, op: str) -> gs.Node | None:
    node = None if tensor is None else producer(tensor)
    return node if node is not None and node.op == op and not node.domain else None


def _reader(node: gs.Node, graph: gs.Graph, op: str) -> gs.Node | None:
    """The only node that reads what `node` computes, if it is an `op`."""
    reader = sole_consumer(node.outputs[0], graph)
    return reader if reader is not None and reader.op == op else None


def _scaled(tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    """What is multiplied by a constant number, and the number; the tensor itself and 1 if nothing is."""
    node = _producer(tensor, "Mul")
    if node is None or not isinstance(node.inputs[1], gs.Constant) or node.inputs[1].values.size != 1:
        return tensor, 1.0
    return node.inputs[0], node.inputs[1].values.item()


def _transposed(tensor: gs.Tensor) -> gs.Tensor | None:
    """k (batch, heads, tokens, width) of kᵀ, which the exporter transposes with the heads folded into the batch."""
    if (unfold := _producer(tensor, "Reshape")) is None:
        return None
    if (swap := _producer(unfold.inputs[0], "Transpose")) is None or swap.attrs["perm"] != [0, 2, 1]:
        return None
    fold = _producer(swap.inputs[0], "Reshape")
    return None if fold is None else fold.inputs[0]


def _split_heads(tensor: gs.Tensor | None) -> tuple[gs.Tensor, int] | None:
    """What (batch, tokens, heads · width) was split into heads, and how many."""
    if (swap := _producer(tensor, "Transpose")) is None or swap.attrs["perm"] != HEADS_FIRST:
        return None
    if (split := _producer(swap.inputs[0], "Reshape")) is None:
        return None
    heads = _third_of_four(split.inputs[1])
    return None if heads is None else (split.inputs[0], heads)


def _third_of_four(shape: gs.Tensor) -> int | None:
    """The heads of the shape (batch, tokens, heads, width): a constant if the tokens are fixed, else joined of four."""
    if isinstance(shape, gs.Constant):
        return shape.values[2].item() if shape.values.size == 4 else None
    joined = _producer(shape, "Concat")
    if joined is None or len(joined.inputs) != 4 or not isinstance(joined.inputs[2], gs.Constant):
        return None
    return joined.inputs[2].values.item()
