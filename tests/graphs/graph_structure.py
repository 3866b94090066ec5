"""What of a graph its passes may depend on: all but the names of nodes and inner tensors and the order of nodes."""

import random

import onnx_graphsurgeon as gs


def disguise(graph: gs.Graph, rng: random.Random) -> None:
    """Rename every node and inner tensor at random, and put the nodes in a random valid order."""
    outputs = {id(tensor) for tensor in graph.outputs}
    inner = [tensor for node in graph.nodes for tensor in node.outputs if id(tensor) not in outputs]
    for objects, prefix in ((graph.nodes, "node"), (inner, "tensor")):
        numbers = rng.sample(range(len(objects)), len(objects))
        for each, number in zip(objects, numbers, strict=True):
            each.name = f"{prefix}{number}"
    waiting, done, order = list(graph.nodes), set(), []
    while waiting:
        ready = [node for node in waiting if all(id(p) in done for tensor in node.inputs for p in tensor.inputs)]
        chosen = rng.choice(ready)
        waiting = [node for node in waiting if node is not chosen]
        done.add(id(chosen))
        order.append(chosen)
    graph.nodes = order


def structure(traced) -> tuple:
    """All of a graph but the names of nodes and inner tensors and the order of nodes: equal iff the graphs are."""
    weights = {codes: repr(weight) for codes, weight in traced.linears.items()}
    weights |= {name: repr(each) for name, each in traced.tensors.items()}
    weights |= {name: repr(parts) for name, parts in traced.stacks.items()}
    number: dict[tuple, int] = {}
    seen: dict[int, int] = {}

    def of(tensor: gs.Tensor) -> int:
        """A number for the computation that ends in the tensor, so that shared parts are described once."""
        if id(tensor) not in seen:
            if tensor.inputs:
                node = tensor.inputs[0]
                attributes = tuple(sorted((key, repr(value)) for key, value in node.attrs.items()))
                place = [output is tensor for output in node.outputs].index(True)
                key = (node.domain, node.op, attributes, place, *map(of, node.inputs))
            elif isinstance(tensor, gs.Constant):
                key = (tensor.values.tobytes(), tensor.values.shape)
            else:
                key = (tensor.name, weights.get(tensor.name))
            seen[id(tensor)] = number.setdefault(key, len(number))
        return seen[id(tensor)]

    outputs = tuple(map(of, traced.graph.outputs))
    return outputs, tuple(number), sorted(weights.items()), len(traced.graph.nodes)
