"""Fuse what follows the last linear layer of a branch into it: the gate of adaLN-Zero and the residual.

    residual + gate * TwinLogLinear(x)  ->  TwinLogLinearResidual(x, gate, residual)

A branch without a gate gets one of ones. Likewise for the siblings of TwinLogLinear.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphs.passes.channels import NoMatch
from graphs.passes.norms import check_modulates
from graphs.passes.patterns import (
    PLAIN_LINEAR_OPS,
    RESIDUAL_OF,
    is_lrq,
    is_number,
    is_standard,
    numpy_type,
    producer,
    redirect_shapes,
    remove_node,
    sole_value_reader,
    value_readers,
)
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph, read_by


def fuse_epilogue(traced: TracedGraph) -> PassResult:
    result = PassResult()
    linears = [node for node in traced.graph.nodes if is_lrq(node, *PLAIN_LINEAR_OPS)]
    for linear in sorted(linears, key=lambda node: _precedence(node.outputs[0], traced)):
        try:
            fired = _fuse(linear, traced)
        except NoMatch as reason:
            result.skip(linear, str(reason))
            continue
        result.fired += fired
    if result.fired:
        traced.forget_unused()
    return result


def _fuse(linear: gs.Node, traced: TracedGraph) -> bool:
    """Whether a gate and a residual, or the latter alone, follow the layer and are part of it now."""
    product, gate = linear.outputs[0], None
    last, reader = product, sole_value_reader(product, traced.graph)
    if is_standard(reader, "Mul"):
        gate, last = _other(reader, product), reader.outputs[0]
        reader = sole_value_reader(last, traced.graph)
    if not is_standard(reader, "Add"):
        if gate is not None and reader is not None and is_lrq(reader, *PLAIN_OF):
            raise NoMatch("the layer that it is added to takes it as its residual")
        if gate is not None and not is_number(gate):
            raise NoMatch("it is multiplied by a gate, and nothing is added to that alone")
        if any(_adds_to(each, product) for each in value_readers(product)):
            raise NoMatch("something is added to it that may be a residual, but it is also read elsewhere")
        return False
    residual, (y,) = _other(reader, last), reader.outputs
    if not residual.inputs and not any(residual is each for each in traced.model_inputs()):
        raise NoMatch("what is added to it is a constant or weight, no residual")
    if not product.shape or None in product.shape or residual.shape is None or [*residual.shape] != [*product.shape]:
        raise NoMatch(f"what is added to it has shape {residual.shape}, needed {product.shape}")
    if gate is None:
        gate = gs.Constant(f"{linear.name}.no_gate", np.ones(int(linear.attrs["rows"]), numpy_type(product)))
    check_modulates("gate", gate, product)
    asked = [node for each in (product, last) for node in each.outputs if node.op == "Shape"]
    if asked and any(_computed_from(each, asked) for each in (gate, residual)):
        raise NoMatch("its own shape is asked for to compute the gate or what is added")
    for each in (product, last):
        redirect_shapes(each, y)
    for gone in {id(each): each for each in (*product.outputs, reader)}.values():
        remove_node(gone, traced.graph)  # at once: what it reads has one reader less
    linear.op, linear.inputs, linear.outputs = RESIDUAL_OF[linear.op], [*linear.inputs, gate, residual], [y]
    return True


def _precedence(product: gs.Tensor, traced: TracedGraph) -> tuple[bool, bool]:
    """Which of two layers that are added to each other takes the other one, least first, in any order of nodes.

    One with a gate before one without, then the right operand of the Add before the left.
    """
    reader = sole_value_reader(product, traced.graph)
    gated = is_standard(reader, "Mul")
    if gated:
        (product,) = reader.outputs
        reader = sole_value_reader(product, traced.graph)
    return not gated, not (is_standard(reader, "Add") and reader.inputs[1] is product)


def open_epilogues(traced: TracedGraph) -> None:
    """Undo `fuse_epilogue`, for targets that have no such product and for the proof that nothing else has changed."""
    graph = traced.graph
    for node in [node for node in graph.nodes if is_lrq(node, *PLAIN_OF)]:
        *inputs, gate, residual = node.inputs
        (y,) = node.outputs
        product, gated = (gs.Variable(f"{y.name}.{part}", y.dtype, y.shape) for part in ("product", "gated"))
        without_gate = isinstance(gate, gs.Constant) and (gate.values == 1).all()
        node.op, node.inputs, node.outputs = PLAIN_OF[node.op], inputs, [gated if without_gate else product]
        if not without_gate:
            graph.nodes.append(gs.Node("Mul", f"{node.name}.gate", {}, [gate, product], [gated]))
        graph.nodes.append(gs.Node("Add", f"{node.name}.residual", {}, [gated, residual], [y]))
    traced.forget_unused()


PLAIN_OF = {fused: plain for plain, fused in RESIDUAL_OF.items()}


def _adds_to(node: gs.Node, product: gs.Tensor) -> bool:
    """Whether a node adds something of the product's shape to it that is computed or fed."""
    added = _other(node, product) if is_standard(node, "Add") else product
    return added is not product and not isinstance(added, gs.Constant) and added.shape == product.shape


def _computed_from(tensor: gs.Tensor, nodes: list[gs.Node]) -> bool:
    """Whether `tensor` depends on what one of the nodes computes."""
    wanted, seen, stack = {id(node) for node in nodes}, set(), [tensor]
    while stack:
        node = producer(stack.pop())
        if node is None or id(node) in seen:
            continue
        if id(node) in wanted:
            return True
        seen.add(id(node))
        stack += read_by(node)  # in its branches too
    return False


def _other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    """The other operand of a binary node; the tensor itself if that is read twice."""
    return next((each for each in node.inputs if each is not tensor), tensor)
