"""A graph whose weights are still expressions: what trace produces, passes rewrite and bind completes.

Every weight tensor of the graph is a graph input without a value; `linears` and `tensors` say what each will be, and
`stacks` which of them are the rows of one. On disk it is one small ONNX file, the tables as JSON in its metadata.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from graphs import names
from graphs.equalizer import divisors
from graphs.expressions import Expression, RotateOutput, StackRows

METADATA_KEY = "lrq.weights"


@dataclass(frozen=True)
class LinearWeight:
    """The quantized weight of one linear layer, keyed in `TracedGraph.linears` by the name of its codes tensor."""

    layer: str  # module path in the source model
    weight: Expression  # (rows, cols)
    bits: int
    group_size: int  # columns that share levels; cols when per channel
    act_bits: int

    def __post_init__(self):
        numbers = (self.bits, self.group_size, self.act_bits)
        if not isinstance(self.layer, str) or not all(type(number) is int for number in numbers):
            raise TypeError(f"a weight of layer {self.layer!r}: {numbers}, needed a name and whole numbers")

    def tensor(self, role: str) -> str:
        """Name of the graph tensor of one of `names.WEIGHT_ROLES`."""
        return f"{self.layer}.{role}"


@dataclass(frozen=True)
class Signs:
    """What a constant `signs` of HadamardRotate is made of: ±1 by a seed, all ones for None, over divisors, if any."""

    seed: int | None = None
    equalizer: str | None = None

    def __post_init__(self):
        if type(self.seed) not in (int, type(None)) or not isinstance(self.equalizer, str | None):
            raise TypeError(f"signs of seed {self.seed!r} and equalizer {self.equalizer!r}")

    def magnitudes(self, width: int) -> np.ndarray:
        """Their absolute values, float32 (width,)."""
        if self.equalizer is None:
            return np.ones(width, np.float32)
        return (1 / divisors(self.equalizer)).astype(np.float32)


@dataclass
class TracedGraph:
    """`graph` with its weights as named placeholders, and the tables that say what they stand for."""

    graph: gs.Graph
    linears: dict[str, LinearWeight] = field(default_factory=dict)  # codes tensor -> quantized weight
    tensors: dict[str, Expression] = field(default_factory=dict)  # tensor -> weight kept in floating point
    signs: dict[str, Signs] = field(default_factory=dict)  # constant tensor that a rotation multiplies by -> its origin
    # Graph input -> the entries of `linears` or `tensors`, or tensors of the former's roles, whose rows it stacks.
    stacks: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def copy(self) -> "TracedGraph":
        """A copy that a pass may edit while this one stays as it is; expressions are immutable and shared."""
        graph = _imported(gs.export_onnx(self.graph))
        return TracedGraph(graph, dict(self.linears), dict(self.tensors), dict(self.signs), dict(self.stacks))

    def placeholders(self) -> set[str]:
        """Names of the graph inputs that stand for weights."""
        of_linears = {weight.tensor(role) for weight in self.linears.values() for role in names.WEIGHT_ROLES}
        return of_linears | self.tensors.keys() | self.stacks.keys()

    def parts(self, name: str) -> tuple[str, ...]:
        """The placeholders whose rows the graph input `name` stacks; itself alone if it is no stack."""
        return self.stacks.get(name, (name,))

    def codes_inputs(self) -> list[str]:
        """The graph inputs that are codes of quantized weights, in the graph's order."""
        return [tensor.name for tensor in self.graph.inputs if self.parts(tensor.name)[0] in self.linears]

    def float_inputs(self) -> list[str]:
        """The graph inputs that are weights kept in floating point, in the graph's order."""
        return [tensor.name for tensor in self.graph.inputs if self.parts(tensor.name)[0] in self.tensors]

    def linear_parts(self, codes: str) -> list[LinearWeight]:
        """The weights, top rows first, of the node that reads `codes`."""
        return [self.linears[part] for part in self.parts(codes)]

    def expression(self, name: str) -> Expression:
        """What a graph input stands for: the weight (rows, cols) of codes, or a tensor kept in floating point."""
        first, *others = (
            self.linears[part].weight if part in self.linears else self.tensors[part] for part in self.parts(name)
        )
        return first.then(StackRows(tuple(others))) if others else first

    def model_inputs(self) -> list[gs.Tensor]:
        """The graph inputs that the model itself has, in order: all but the placeholders."""
        weights = self.placeholders()
        return [tensor for tensor in self.graph.inputs if tensor.name not in weights]

    def rotate_outputs(self, steps: Mapping[str, RotateOutput]) -> None:
        """Append a map to each weight (by its codes, or its own name) or bias that is named.

        If one does not fit, raises ValueError and changes none.
        """
        coded = {name: self.linears[name] for name in steps if name in self.linears}
        linears = {name: replace(each, weight=each.weight.then(steps[name])) for name, each in coded.items()}
        tensors = {name: self.tensors[name].then(step) for name, step in steps.items() if name not in coded}
        self.linears.update(linears)
        self.tensors.update(tensors)

    def forget_unused(self) -> None:
        """Drop nodes, weights and signs that no output needs, and restore topological order; model inputs all stay."""
        weights = self.placeholders()
        self.graph.cleanup(remove_unused_graph_inputs=False)
        sort_nodes(self.graph)
        read = {tensor.name for node in self.graph.nodes for tensor in read_by(node)}
        self.graph.inputs = [t for t in self.graph.inputs if t.name in read or t.name not in weights]
        self.stacks = {name: parts for name, parts in self.stacks.items() if name in read}
        used = read.union(*self.stacks.values())
        self.linears = {codes: weight for codes, weight in self.linears.items() if codes in used}
        self.tensors = {name: expression for name, expression in self.tensors.items() if name in used}
        self.signs = {name: signs for name, signs in self.signs.items() if name in used}

    def to_onnx(self) -> onnx.ModelProto:
        """The graph as an ONNX model with placeholders as inputs and the weight tables in its metadata."""
        model = gs.export_onnx(self.graph)
        model.ir_version = names.IR_VERSION
        tables = {
            "linears": {
                codes: asdict(weight) | {"weight": weight.weight.to_json()} for codes, weight in self.linears.items()
            },
            "tensors": {name: expression.to_json() for name, expression in self.tensors.items()},
            "signs": {name: asdict(signs) for name, signs in self.signs.items()},
            "stacks": self.stacks,
        }
        onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(tables, sort_keys=True)})
        return model

    @classmethod
    def from_onnx(cls, model: onnx.ModelProto) -> "TracedGraph":
        """Inverse of `to_onnx`; raises ValueError for a model without weight tables."""
        properties = {entry.key: entry.value for entry in model.metadata_props}
        if METADATA_KEY not in properties:
            raise ValueError(f"the model carries no {METADATA_KEY!r} metadata, so it is not a traced graph")
        tables = json.loads(properties[METADATA_KEY])
        bare = copy.deepcopy(model)
        del bare.metadata_props[:]
        return cls(
            _imported(bare),
            {
                codes: LinearWeight(**row | {"weight": Expression.from_json(row["weight"])})
                for codes, row in tables["linears"].items()
            },
            {name: Expression.from_json(row) for name, row in tables["tensors"].items()},
            {name: Signs(**row) for name, row in tables["signs"].items()},
            {name: _names(parts) for name, parts in tables["stacks"].items()},
        )


def _names(parts: list[str]) -> tuple[str, ...]:
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"a stack of {parts!r}, needed names")
    return tuple(parts)


def _imported(model: onnx.ModelProto) -> gs.Graph:
    """graphsurgeon keeps bfloat16 as it is, and says on standard output for every tensor that numpy lacks it."""
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        return gs.import_onnx(model)


def sort_nodes(graph: gs.Graph) -> None:
    """Put every node behind those it reads from, and otherwise leave the order as it is.

    gs.Graph.toposort recurses once per level, past Python's limit on a deep transformer whose nodes are out of order.
    """
    producer = {tensor.name: node for node in graph.nodes for tensor in node.outputs if not tensor.is_empty()}
    ordered: dict[int, gs.Node] = {}
    for last in graph.nodes:
        stack = [last]
        while stack:
            node = stack[-1]
            sources = [producer[tensor.name] for tensor in read_by(node) if tensor.name in producer]
            missing = [source for source in sources if id(source) not in ordered]
            if missing and len(stack) <= len(graph.nodes):
                stack += missing[:1]
            elif missing:
                raise ValueError(f"the graph has a cycle through {node.op} {node.name!r}")
            else:
                ordered.setdefault(id(stack.pop()), node)
    graph.nodes = list(ordered.values())


def read_by(node: gs.Node) -> list[gs.Tensor]:
    """The tensors that a node reads, those that only its subgraphs read among them."""
    inner = []
    for subgraph in node.subgraphs(recursive=True):
        inner += [*subgraph.outputs, *(tensor for each in subgraph.nodes for tensor in each.inputs)]
    return [*node.inputs, *inner]
