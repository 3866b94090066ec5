"""Rewrite the projections of one input that meet in one attention into a single linear layer and a Split.

    q = TwinLogLinear(x, Wq), k = TwinLogLinear(x, Wk), v = TwinLogLinear(x, Wv)
        ->  q, k, v = Split(TwinLogLinear(x, [Wq; Wk; Wv]), axis = -1)

x is quantized once, and one wide product keeps more of the machine busy than three narrow ones. An attention is one
Attention node, or a product of a Softmax with values; its projections are the linear layers nearest above its queries,
keys and values.
Those of other attentions are left apart even where they read the same tensor (every block's text keys and values do):
merged, all of them would be held from the first block to the last.
"""

import math
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from graphs import names
from graphs.ops import OPS, packing
from graphs.passes.patterns import (
    PLAIN_LINEAR_OPS,
    computed_by,
    is_graph_output,
    is_lrq,
    is_standard,
    layer_weight,
    producer,
    scaled_operand,
)
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def merge_projections(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for siblings in _siblings(traced.graph, result):
        obstacle = _obstacle(siblings, traced)
        if obstacle is not None:
            result.skip(siblings[0], obstacle)
            continue
        _merge(siblings, traced)
        result.fired += 1
    if result.fired:
        traced.forget_unused()
    return result


def projections(attention: gs.Node) -> list[gs.Node]:
    """The linear layers nearest above queries, keys and values of an Attention or Softmax node, in this order.

    Empty unless a softmax is of one product, scaled, capped or masked perhaps, and multiplied with something.
    """
    operands = attention.inputs[:3] if attention.op == "Attention" else _around(attention)
    return list({id(node): node for operand in operands for node in _nearest_linears(operand)}.values())


def _around(softmax: gs.Node) -> tuple[gs.Tensor, ...]:
    """Queries, keys and values of the attention around a softmax; empty if there is none, or more than one product."""
    scores, probabilities = _scores(producer(softmax.inputs[0])), _where_numbers(softmax.outputs[0])
    if len(scores) > 1:
        scores = [each for each in scores if not _is_of_weights(each)]
    mixed = list(probabilities.outputs)
    while len(mixed) == 1 and scaled_operand(mixed[0]) is not None:
        probabilities = mixed[0].outputs[0]
        mixed = list(probabilities.outputs)
    mixed = [reader for reader in mixed if is_standard(reader, "MatMul")]
    if len(scores) != 1 or len(mixed) != 1 or mixed[0].inputs[0] is not probabilities:
        return ()
    return (*scores[0].inputs, mixed[0].inputs[1])


def _scores(node: gs.Node | None, steps: int = 6) -> list[gs.Node]:
    """The products that a node scales, caps or masks, in at most so many steps."""
    if is_standard(node, "MatMul"):
        return [node]
    if not steps or not (scaled_operand(node) is not None or is_standard(node, "Add", "Where", "Tanh")):
        return []
    found = [scores for each in node.inputs for scores in _scores(producer(each), steps - 1)]
    return list({id(each): each for each in found}.values())


def _is_of_weights(product: gs.Node) -> bool:
    """Whether a MatMul is one with a weight, as that of a mask with a table of positions; scores are of two tensors."""
    return bool(layer_weight(product.inputs[1])) or any(producer(each) is None for each in product.inputs)


def _where_numbers(probabilities: gs.Tensor) -> gs.Tensor:
    """Where(IsNaN(p), 0, p), as torch writes for rows that are masked altogether, or the probabilities as they are."""
    guards = [each for each in probabilities.outputs if is_standard(each, "Where")]
    condition = computed_by(guards[0].inputs[0], "IsNaN") if len(guards) == 1 else None
    return guards[0].outputs[0] if condition is not None and condition.inputs[0] is probabilities else probabilities


def _nearest_linears(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The linear nodes that `tensor` is computed from without another one between."""
    seen, stack = set(), [tensor]
    while stack:
        node = producer(stack.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if is_lrq(node, *PLAIN_LINEAR_OPS):
            yield node
        else:
            stack += node.inputs


def _siblings(graph: gs.Graph, result: PassResult) -> list[list[gs.Node]]:
    """Layers that read one input in one way and serve the same attentions, two or more of them, queries first.

    Neither which layers become one nor their order depends on the order of nodes.
    """
    served: dict[int, set[int]] = {}  # layer -> attentions
    places: dict[int, int] = {}  # layer -> its place among the projections of an attention, the least one
    found: dict[int, gs.Node] = {}
    for attention in [node for node in graph.nodes if is_standard(node, "Softmax", "Attention")]:
        for place, node in enumerate(projections(attention)):
            found[id(node)] = node
            served.setdefault(id(node), set()).add(id(attention))
            places[id(node)] = min(place, places.get(id(node), place))
    groups: dict[tuple, list[gs.Node]] = {}
    for node in found.values():
        groups.setdefault((id(node.inputs[0]), frozenset(served[id(node)]), *_format(node)), []).append(node)
    alone = [key for key, nodes in groups.items() if len(nodes) == 1]
    for key in alone:
        if sum(other[:2] == key[:2] for other in groups) > 1:
            result.skip(groups[key][0], "another projection reads the same, in another format or width of activations")
    for nodes in _beside_attention(graph, found).values():
        if len(nodes) > 1:
            result.skip(nodes[0], "others read the same input, but they meet in no attention of a known form")
    merged = [nodes for nodes in groups.values() if len(nodes) > 1]
    return [sorted(nodes, key=lambda node: (places[id(node)], node.inputs[1].name)) for nodes in merged]


def _beside_attention(graph: gs.Graph, found: dict[int, gs.Node]) -> dict[tuple, list[gs.Node]]:
    """The layers that are projections of no attention, those together that read one input in one way."""
    groups: dict[tuple, list[gs.Node]] = {}
    for node in graph.nodes:
        if is_lrq(node, *PLAIN_LINEAR_OPS) and id(node) not in found:
            groups.setdefault((id(node.inputs[0]), *_format(node)), []).append(node)
    return {key: sorted(nodes, key=lambda node: node.inputs[1].name) for key, nodes in groups.items()}


def _format(node: gs.Node) -> tuple:
    """What projections that become one have in common: all but their rows."""
    return node.op, tuple(sorted((key, value) for key, value in node.attrs.items() if key != "rows"))


def _obstacle(siblings: list[gs.Node], traced: TracedGraph) -> str | None:
    """Why these may not become one; None if they may."""
    if len({isinstance(node.inputs[-1], gs.Constant) for node in siblings}) > 1:
        return "some of these projections have a bias and others have none"
    for node in siblings:
        if node.inputs[1].name in traced.stacks:
            return f"{node.name} is merged with others already"
        if any(len(tensor.outputs) != 1 for tensor in node.inputs[1:]):
            return f"a weight of {node.name} is also read elsewhere"
        if is_graph_output(node.outputs[0], traced.graph):
            return f"{node.name} is an output of the graph"
        if not isinstance(node.inputs[-1], gs.Constant) and node.inputs[-1].name not in traced.tensors:
            return f"the bias of {node.name} is not a weight"
        if not _fills_bytes(node):
            return f"the codes of {node.name} do not fill whole bytes"
    return None


def _fills_bytes(node: gs.Node) -> bool:
    """Whether the packed codes of a linear node end with a byte, so that others can follow."""
    bits = node.attrs.get("bits", names.INT8_BITS)
    if bits == names.INT8_BITS:
        return True
    form = packing.layout(bits)
    return math.prod(form.shape(node.attrs["rows"], node.attrs["cols"])) * form.element_bits % 8 == 0


def _merge(siblings: list[gs.Node], traced: TracedGraph) -> None:
    graph, first = traced.graph, siblings[0]
    name = _common_name([traced.linears[node.inputs[1].name].layer for node in siblings])
    rows = [int(node.attrs["rows"]) for node in siblings]
    packed = [
        _stack(traced, f"{name}.{tensor.name}", [node.inputs[place] for node in siblings])
        for place, tensor in enumerate(OPS[first.op].inputs)
        if tensor.name in names.WEIGHT_ROLES
    ]
    bias = _stacked_bias(traced, name, siblings)
    shape = first.outputs[0].shape
    merged = gs.Variable(f"{name}.merged", first.outputs[0].dtype, None if shape is None else [*shape[:-1], sum(rows)])
    outputs = [node.outputs[0] for node in siblings]
    for node in siblings:
        node.outputs.clear()
    graph.nodes += [
        gs.Node(
            first.op, name, dict(first.attrs) | {"rows": sum(rows)}, [first.inputs[0], *packed, bias], [merged],
            domain=names.DOMAIN,
        ),
        gs.Node(
            "Split", f"{name}.split", {"axis": -1}, [merged, gs.Constant(f"{name}.rows", np.array(rows))], outputs
        ),
    ]  # fmt: skip


def _stack(traced: TracedGraph, name: str, parts: list[gs.Tensor]) -> gs.Variable:
    """A new graph input for the rows of `parts`."""
    stacked = gs.Variable(name, parts[0].dtype, [sum(part.shape[0] for part in parts), *parts[0].shape[1:]])
    traced.stacks[name] = tuple(part.name for part in parts)
    traced.graph.inputs.append(stacked)
    return stacked


def _stacked_bias(traced: TracedGraph, name: str, siblings: list[gs.Node]) -> gs.Tensor:
    biases = [node.inputs[-1] for node in siblings]
    if isinstance(biases[0], gs.Constant):  # zeros: none of the layers has one
        return gs.Constant(f"{name}.no_bias", np.concatenate([bias.values for bias in biases]))
    return _stack(traced, f"{name}.bias", biases)


def _common_name(layers: list[str]) -> str:
    """`attn1.to_q, attn1.to_k` -> `attn1.to_q+to_k`."""
    parent = layers[0].rpartition(".")[0]
    if parent and all(layer.rpartition(".")[0] == parent for layer in layers):
        return f"{parent}.{'+'.join(layer.rpartition('.')[2] for layer in layers)}"
    return "+".join(layers)
