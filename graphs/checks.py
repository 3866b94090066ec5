"""What must hold of a traced graph after trace and between passes.

A pass that breaks one of these would show much later, as a wrong image or a plugin that refuses its inputs; here it
shows at once and names the node. That the *function* is kept is proved by running it (`graphs.float_model`).
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphs import names
from graphs.expressions import RotateInput
from graphs.ops import OPS, register
from graphs.ops.spec import OpSpec, Shape
from graphs.passes.patterns import CODED_OPS, codes_form, is_lrq
from graphs.traced import LinearWeight, TracedGraph


class GraphError(ValueError):
    """The graph breaks a rule; the message says where, what was found and what was needed."""

    def __init__(self, where: str, found: str, needed: str):
        super().__init__(f"{where}: {found}, needed {needed}")


def check(traced: TracedGraph) -> None:
    """Raise GraphError for the first rule that the graph breaks."""
    _check_order(traced.graph)
    for node in traced.graph.nodes:
        _check_no_lrq_inside(node)
        if node.domain == names.DOMAIN:
            _check_lrq_node(node, traced)
    _check_placeholders(traced)
    _check_model(traced.to_onnx())


def check_complete(traced: TracedGraph) -> None:
    """Raise GraphError unless every lrq node spells out all attributes of its op, as plugin creators expect them."""
    for node in traced.graph.nodes:
        if node.domain == names.DOMAIN:
            for attribute in OPS[node.op].all_attributes():
                if attribute.name not in node.attrs:
                    raise GraphError(_where(node), f"has no attribute {attribute.name!r}", "all that its op has")


def check_preserved(before: TracedGraph, after: TracedGraph) -> None:
    """Raise GraphError unless both have the same model inputs and outputs, and quantize the same weights.

    Inputs and outputs: names, types and shapes, in one order. A layer may go, but its weight then is in no table: what
    was quantized is not kept in floating point instead.
    """
    for what, had, has in (
        ("model inputs", before.model_inputs(), after.model_inputs()),
        ("outputs", before.graph.outputs, after.graph.outputs),
    ):
        had, has = ([_signature(tensor) for tensor in tensors] for tensors in (had, has))
        lost, new = ([each for each in a if each not in b] for a, b in ((had, has), (has, had)))
        if lost or new:
            raise GraphError(f"the graph's {what}", f"got {', '.join(new) or 'none new'}", ", ".join(lost) or "no more")
        if had != has:
            raise GraphError(f"the graph's {what}", f"got the order {', '.join(has)}", ", ".join(had))
    floating = {source for expression in before.tensors.values() for source in expression.sources()}
    quantized = {source: each for each in before.linears.values() for source in each.weight.sources()}
    for name, expression in after.tensors.items():
        for weight in [quantized[source] for source in expression.sources() if source in quantized.keys() - floating]:
            raise GraphError(
                f"the weight of {weight.layer}", f"kept in floating point as {name!r}", f"{weight.bits} bits as before"
            )

    for codes, now in after.linears.items():
        was = before.linears.get(codes)
        if was is not None and _inputs_rotated(now) != _inputs_rotated(was):
            raise GraphError(f"the weight of {now.layer}", f"its input is rotated by {_inputs_rotated(now) or None}",
                             f"{_inputs_rotated(was) or None} as before")  # fmt: skip


def _inputs_rotated(weight: LinearWeight) -> list[RotateInput]:
    return [each for each in weight.weight.maps if isinstance(each, RotateInput)]


def _signature(tensor: gs.Tensor) -> str:
    shape = "" if tensor.shape is None else ", ".join(map(str, tensor.shape))
    return f"{_type_name(tensor.dtype)}[{shape}] {tensor.name}"


def _type_name(dtype) -> str:
    """graphsurgeon holds a numpy type, a numpy dtype, or ONNX's number of a type that numpy lacks."""
    return str(dtype) if dtype is None or isinstance(dtype, int) else np.dtype(dtype).name


def _check_order(graph: gs.Graph) -> None:
    """Every tensor is defined once, by one tensor object to a name, before it is read."""
    known = {}
    for tensor in graph.inputs:
        _define(known, tensor, f"graph input {tensor.name!r}")
    for node in graph.nodes:
        where = _where(node)
        for tensor in node.inputs:
            if tensor.is_empty():
                continue
            if isinstance(tensor, gs.Constant):
                known.setdefault(tensor.name, tensor)
            if tensor.name not in known:
                raise GraphError(where, f"reads {tensor.name!r} that nothing before it computes", _EARLIER)
            if known[tensor.name] is not tensor:
                raise GraphError(where, f"reads a second tensor named {tensor.name!r}", "one tensor to a name")
        for tensor in node.outputs:
            if not tensor.is_empty():
                _define(known, tensor, where)
    for tensor in graph.outputs:
        if known.get(tensor.name) is not tensor:
            raise GraphError(f"graph output {tensor.name!r}", "nothing computes it", "an output of a node")


_EARLIER = "an input of the graph, a constant or the output of an earlier node"


def _define(known: dict[str, gs.Tensor], tensor: gs.Tensor, where: str) -> None:
    if tensor.name in known:
        raise GraphError(where, f"defines {tensor.name!r}, which is defined already", "a name of its own")
    known[tensor.name] = tensor


def _check_no_lrq_inside(node: gs.Node) -> None:
    """Passes look at the main graph only, so an lrq node in the branch of an If would be missed in silence."""
    for subgraph in node.subgraphs(recursive=True):
        for inner in subgraph.nodes:
            if inner.domain == names.DOMAIN:
                raise GraphError(_where(inner), f"sits in a subgraph of {_where(node)}", "lrq nodes in the main graph")


def _check_lrq_node(node: gs.Node, traced: TracedGraph) -> None:
    where = _where(node)
    if node.op not in OPS:
        raise GraphError(where, f"{node.op} is not an op of the dialect", f"one of {', '.join(OPS)}")
    spec = OPS[node.op]
    if (len(node.inputs), len(node.outputs)) != (len(spec.inputs), len(spec.outputs)):
        raise GraphError(
            where, f"has {len(node.inputs)} inputs and {len(node.outputs)} outputs",
            f"{', '.join(tensor.name for tensor in spec.inputs)} and one output",
        )  # fmt: skip
    _check_attributes_and_shapes(node, spec)
    inputs = dict(zip((tensor.name for tensor in spec.inputs), node.inputs, strict=True))
    if "signs" in inputs:
        _check_rotation(node, inputs["signs"], traced)
    else:  # every op of the dialect rotates or reads a weight
        _check_weight(node, inputs, traced)
        _check_codes_type(node, inputs["codes"])


def _check_attributes_and_shapes(node: gs.Node, spec: OpSpec) -> None:
    try:
        attributes = spec.node_attributes(**node.attrs)
        inferred = spec.infer_shape([_shape(tensor) for tensor in node.inputs], attributes)
    except (ValueError, TypeError) as error:
        raise GraphError(_where(node), str(error), "what the op's definition says (graphs/ops)") from error
    for tensor, shape in zip(node.outputs, inferred, strict=True):
        if not _agree(_shape(tensor), shape):
            raise GraphError(_where(node), f"its output {tensor.name!r} is declared {_shape(tensor)}", f"{shape}")


def _check_rotation(node: gs.Node, signs: gs.Tensor, traced: TracedGraph) -> None:
    output = node.outputs[0]
    if not output.outputs and not any(output is each for each in traced.graph.outputs):
        raise GraphError(_where(node), "nobody reads the rotated tensor", "a reader, or the node removed")
    if signs.name not in traced.signs:
        return
    origin = traced.signs[signs.name]
    if not isinstance(signs, gs.Constant) or not np.array_equal(
        abs(signs.values), origin.magnitudes(signs.shape[0]).astype(signs.values.dtype)
    ):
        needed = "a constant of +-1" if origin.equalizer is None else "a constant of +-1 / d"
        raise GraphError(_where(node), f"its signs {signs.name!r} are in the table of signs", needed)
    if origin.seed is None and (signs.values < 0).any():
        raise GraphError(_where(node), f"its signs {signs.name!r} are negative", "none where the table has no seed")


def _check_weight(node: gs.Node, inputs: dict[str, gs.Tensor], traced: TracedGraph) -> None:
    """The packed inputs and attributes of a node are those of its rows of the weight table."""
    where, codes = _where(node), inputs["codes"].name
    missing = [part for part in traced.parts(codes) if part not in traced.linears]
    if missing:
        raise GraphError(where, f"its codes {missing[0]!r} are in no row of the weight table", "a LinearWeight")
    weights = traced.linear_parts(codes)
    for role in [role for role in names.WEIGHT_ROLES if role in inputs]:
        found, needed = traced.parts(inputs[role].name), tuple(weight.tensor(role) for weight in weights)
        if found != needed:
            raise GraphError(where, f"its {role} are {_listed(found)}", _listed(needed))
    for weight in weights:
        for name, needed in _table_attributes(weight).items():
            if node.attrs.get(name, needed) != needed:
                raise GraphError(
                    where, f"{name} is {node.attrs[name]}", f"{needed} as {weight.layer} in the weight table"
                )
    rows = sum(weight.weight.shape[0] for weight in weights)
    if node.attrs["rows"] != rows:
        layers = ", ".join(weight.layer for weight in weights)
        raise GraphError(where, f"rows is {node.attrs['rows']}", f"{rows} as {layers} in the weight table")


def _check_codes_type(node: gs.Node, codes: gs.Tensor) -> None:
    """Codes have the type of their layout, or the INT8 of a trace: wider ones would be widened weights."""
    if not is_lrq(node, *CODED_OPS):
        return
    needed, _ = codes_form(node)
    if codes.dtype not in (needed, np.int8):
        raise GraphError(
            _where(node), f"its codes {codes.name!r} are {_type_name(codes.dtype)}", f"{needed.name} as its layout says"
        )


def _table_attributes(weight: LinearWeight) -> dict[str, int]:
    """What the weight table says of those attributes that a node which reads the weight has, but for its rows."""
    attributes = {"cols": weight.weight.shape[1], "bits": weight.bits, "group_size": weight.group_size}
    return attributes | {"act_bits": weight.act_bits}


def _listed(found: tuple[str, ...]) -> str:
    return ", ".join(map(repr, found))


def _check_placeholders(traced: TracedGraph) -> None:
    """Every entry of the tables is a graph input that is read, or a part of one, of the shape of its expression."""
    inputs = {tensor.name: tensor for tensor in traced.graph.inputs}
    stacked = {part for parts in traced.stacks.values() for part in parts}
    for name in [*traced.linears, *traced.tensors, *traced.stacks]:
        if name in stacked and name in inputs:
            raise GraphError(f"weight {name!r}", "it is a graph input and a part of another", "one of both")
        if name in stacked:
            continue
        if name not in inputs:
            raise GraphError(f"weight {name!r}", "the table has it but the graph does not", "a graph input")
        if not inputs[name].outputs:
            raise GraphError(f"weight {name!r}", "nobody reads it", "a reader, or the weight forgotten")
    for name in traced.float_inputs():
        shape, needed = _shape(inputs[name]), traced.expression(name).shape
        if shape != needed:
            raise GraphError(f"weight {name!r}", f"its graph input has shape {shape}", f"{needed}")


def _check_model(model: onnx.ModelProto) -> None:
    register()
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError("the ONNX checker", " ".join(str(error).split()), "a valid model") from error


def _where(node: gs.Node) -> str:
    return f"{node.op} {node.name!r}"


def _shape(tensor: gs.Tensor) -> Shape:
    """The shape with every size that is not a number as a name or None, as `OpSpec.infer_shape` takes it."""
    return None if tensor.shape is None else tuple(tensor.shape)


def _agree(left: Shape, right: Shape) -> bool:
    """Whether two shapes may be one: equal ranks, and equal sizes where both are numbers."""
    if left is None or right is None:
        return True
    numbers = [(a, b) for a, b in zip(left, right, strict=False) if isinstance(a, int) and isinstance(b, int)]
    return len(left) == len(right) and all(a == b for a, b in numbers)
