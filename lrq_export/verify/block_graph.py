"""One transformer block of a traced graph: which nodes compute it, and the few boxes that are worth drawing of them.

A block is named by the prefix of its layers' module paths up to the first number, `transformer_blocks.0.`; blocks of
one kind differ in that number. Its nodes are found by what depends on which weights:

- A node *is touched* by a block if it depends on a weight of it, and on none of a later block: one of whose weights
  meets what this block computed. What is not repeated, the last projection for one, is a block of its own here.
- A node that reads no weight *leads into* some nodes if these alone read it, and only one of them does, or all of them
  multiply it by a weight or lead in themselves. So the norm before the first projection leads into a block; the
  residual stream does not: whoever adds to it reads it too.

The block is what it touches, without what leads into later blocks, and what leads into that.
"""

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

import numpy as np
import onnx_graphsurgeon as gs

from graphs import names
from graphs.traced import LinearWeight, TracedGraph

BLOCK = re.compile(r"((?:[^.]+\.)*?)\d+\.")  # group 1: the kind

ROTATION, FUSED, LINEAR, STANDARD, INPUT, OUTPUT = "rotation", "fused", "linear", "standard", "input", "output"
FUSED_ENDINGS = ("Rotate", "Residual")  # of ops that a pass makes of a rotation or a residual and its neighbours

VIEWS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Cast", "Expand")
SIZE_SOURCES = ("Shape", "Size")
PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Box:
    """What is drawn as one: a node, or several that mean one thing."""

    kind: str
    title: str
    detail: str = ""


@dataclass
class BlockGraph:
    """The boxes of a block in an order in which every edge (from, to) points forward, and what the block consists of.

    `rotations` counts the nodes that rotate, `fused_rotations` those of them that do other things too, `linears` the
    products with a weight matrix, `nodes` all nodes, also those that are not drawn.
    """

    boxes: list[Box] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    rotations: int = 0
    fused_rotations: int = 0
    linears: int = 0
    nodes: int = 0


def repeated_blocks(traced: TracedGraph) -> list[str]:
    """The prefix of the first block of each kind of which two hold the same quantized layers, in the graph's order."""
    layers: dict[str, set[str]] = defaultdict(set)
    for node in traced.graph.nodes:
        for weight in _quantized(traced, node):
            if found := BLOCK.match(weight.layer):
                layers[found[0]].add(weight.layer.removeprefix(found[0]))
    alike = Counter((_kind(prefix), frozenset(inside)) for prefix, inside in layers.items())
    first: dict[str, str] = {}
    for prefix, inside in layers.items():
        if alike[_kind(prefix), frozenset(inside)] > 1:
            first.setdefault(_kind(prefix), prefix)
    return list(first.values())


def block_graph(traced: TracedGraph, prefix: str) -> BlockGraph:
    """What is drawn of the block `prefix`: views, sizes and constants left out, a linear layer or attention one box.

    The graph's nodes must be in topological order.
    """
    return _Boxes(_Wires(traced), prefix).drawn


def _kind(prefix: str) -> str:
    return BLOCK.match(prefix)[1]


def _quantized(traced: TracedGraph, node: gs.Node) -> list[LinearWeight]:
    """The quantized weights whose codes a node reads."""
    parts = [part for tensor in node.inputs for part in traced.parts(tensor.name)]
    return [traced.linears[part] for part in parts if part in traced.linears]


class _Wires:
    """Who reads what: nodes are numbers, in the graph's order; tensors are names."""

    def __init__(self, traced: TracedGraph):
        self.traced, self.nodes = traced, list(traced.graph.nodes)
        self.outputs = {tensor.name for tensor in traced.graph.outputs}
        self.producer = {tensor.name: i for i, node in enumerate(self.nodes) for tensor in node.outputs}
        self.readers: list[set[int]] = [set() for _ in self.nodes]
        # Tensor -> the placeholders that it is computed from, and nothing else: a weight, its decoding, its transpose.
        self.weights: dict[str, tuple[str, ...]] = {}
        placeholders = traced.placeholders()
        self.weights |= {name: (name,) for each in traced.graph.inputs if (name := each.name) in placeholders}
        self.sizes: set[str] = set()  # tensors that hold sizes of others
        for i, node in enumerate(self.nodes):
            self._follow(i, node)

    def _follow(self, i: int, node: gs.Node) -> None:
        computed = [tensor.name for tensor in node.inputs if not _is_constant(tensor)]
        for name in computed:
            if name in self.producer:
                self.readers[self.producer[name]].add(i)
        made = [tensor.name for tensor in node.outputs]
        if node.op in SIZE_SOURCES or (computed and self.sizes.issuperset(computed)):
            self.sizes.update(made)
        elif computed and all(name in self.weights for name in computed):
            read = tuple(weight for name in computed for weight in self.weights[name])
            self.weights |= dict.fromkeys(made, read)

    def read_weights(self, i: int) -> list[str]:
        """The placeholders that a node reads, decoded and transposed or as they are."""
        return [weight for tensor in self.nodes[i].inputs for weight in self.weights.get(tensor.name, ())]

    def data(self, i: int) -> list[str]:
        """The tensors that a node computes with: no weights, sizes or constants; a view reads one."""
        computed = [tensor.name for tensor in self.nodes[i].inputs if not _is_constant(tensor)]
        found = [name for name in computed if name not in self.weights and name not in self.sizes]
        return found[:1] if self.nodes[i].op in VIEWS else found

    def reads(self, i: int, name: str) -> bool:
        return any(tensor.name == name for tensor in self.nodes[i].inputs)

    def is_computed_from_weights(self, i: int) -> bool:
        return any(tensor.name in self.weights for tensor in self.nodes[i].outputs)

    def is_size(self, i: int) -> bool:
        return any(tensor.name in self.sizes for tensor in self.nodes[i].outputs)

    def blocks_of(self, weight: str) -> list[str]:
        """The block that a placeholder is of: none, one, or several for a stack of rows of several."""
        found = (BLOCK.match(part) for part in self.traced.parts(weight))
        return list(dict.fromkeys(match[0] for match in found if match))

    def block(self, prefix: str) -> list[int]:
        """The nodes of a block, as the module's docstring defines them."""
        # Sets of blocks as bits: of those whose weights a node reads, and of those that it depends on.
        direct, own = self._direct(prefix)
        below: list[int] = []
        for i, node in enumerate(self.nodes):
            made_by = (self.producer[tensor.name] for tensor in node.inputs if tensor.name in self.producer)
            below.append(reduce(or_, (below[j] for j in made_by), direct[i]))
        later = reduce(or_, (bits & ~own for bits, under in zip(direct, below, strict=True) if under & own), 0)
        after = {i for i, bits in enumerate(below) if bits & later}
        touched = {i for i, bits in enumerate(below) if bits & own and i not in after}
        touched -= self._leading_into(after, {i for i in after if direct[i]})
        return sorted(touched | self._leading_into(touched, {i for i in touched if direct[i] & own}))

    def _direct(self, prefix: str) -> tuple[list[int], int]:
        """For each node the blocks whose weights it reads, as bits, and the bit of the block `prefix`.

        A weight of no block is like a block of its own, unless several nodes read it: it may be shared by blocks.
        """
        read = [self.read_weights(i) for i in range(len(self.nodes))]
        uses = Counter(w for i, each in enumerate(read) if not self.is_computed_from_weights(i) for w in set(each))
        groups = {w: self.blocks_of(w) or [w] * (uses[w] == 1) for w in uses}
        numbers: dict[str, int] = {}
        for group in (group for each in groups.values() for group in each):
            numbers.setdefault(group, 1 << len(numbers))
        bits = {w: reduce(or_, (numbers[group] for group in each), 0) for w, each in groups.items()}
        return [reduce(or_, (bits[w] for w in each if w in bits), 0) for each in read], numbers.get(prefix, 0)

    def _leading_into(self, nodes: set[int], reading_weights: set[int]) -> set[int]:
        """What leads into `nodes`, of which `reading_weights` multiply what they read by a weight of theirs."""
        leading: set[int] = set()
        for i in reversed(range(len(self.nodes))):
            readers = self.readers[i]
            leaves = any(tensor.name in self.outputs for tensor in self.nodes[i].outputs)
            if i in nodes or leaves or not readers or self.is_size(i) or self.read_weights(i):
                continue
            if readers <= nodes | leading and (len(readers) == 1 or readers <= reading_weights | leading):
                leading.add(i)
        return leading

    def origin(self, name: str) -> str:
        """What a tensor comes from, in words: the nearest model input, or module whose weights made it."""
        waiting, seen = deque([name]), {name}
        while waiting:
            nearest = waiting.popleft()
            if nearest not in self.producer:
                return nearest
            i = self.producer[nearest]
            if weights := self.read_weights(i):
                return next(iter(self.blocks_of(weights[0])), _module(weights[0])).rstrip(".")
            further = [each for each in self.data(i) if each not in seen]
            waiting += further
            seen.update(further)
        return "sizes of the inputs"


def _is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or tensor.is_empty()


def _module(weight: str) -> str:
    """Module path of a placeholder; its own name where the module is called nothing else."""
    module, _, role = weight.rpartition(".")
    return module if role in (*names.WEIGHT_ROLES, "weight", "bias") else weight


class _Boxes:
    """Turns the nodes of one block into `drawn`."""

    def __init__(self, wires: _Wires, prefix: str):
        self.wires, self.prefix = wires, prefix
        self.members = wires.block(prefix)
        self.inside = set(self.members)
        self.drawn = BlockGraph(nodes=len(self.members))
        self.source: dict[str, int] = {}  # tensor -> the box that it comes from
        self.host = self._hosts()
        self.guests: dict[int, list[int]] = defaultdict(list)
        for guest, host in self.host.items():
            self.guests[host].append(guest)
        pending: dict[int, list[str]] = defaultdict(list)
        for i in self.members:
            if wires.is_computed_from_weights(i) or wires.is_size(i):
                continue
            host = self.host.get(i, i)
            pending[host] += [name for name in wires.data(i) if name not in pending[host]]
            if host != i:
                continue
            if wires.nodes[i].op in VIEWS and pending[i]:
                box = self._source_of(pending[i][0])
            else:
                box = self._add(i, pending[i])
            self.source |= {tensor.name: box for tensor in wires.nodes[i].outputs}
        self._add_outputs()

    def _hosts(self) -> dict[int, int]:
        """Node -> the last node of the box that it is drawn in, for all that are not drawn by themselves."""
        found: dict[int, int] = {}
        for i in self.members:
            if self.wires.nodes[i].op == "MatMul" and self.wires.read_weights(i):
                bias = self._sole_reader(i)
                if bias is not None and self._adds_bias(bias, i):
                    found[i] = bias
        for i in self.members:
            if self.wires.nodes[i].op == "Softmax":
                found |= self._attention(i, {*found, *found.values()})
        return found

    def _adds_bias(self, add: int, product: int) -> bool:
        """Whether a node adds to a product what is one weight of as many elements as the product has columns."""
        weights = self.wires.read_weights(add)
        if self.wires.nodes[add].op != "Add" or len(weights) != 1 or self.wires.data(add) == []:
            return False
        rows = self._matrix_shape(product)
        return rows is not None and self.wires.traced.expression(weights[0]).shape == rows[:1]

    def _attention(self, softmax: int, taken: set[int]) -> dict[int, int]:
        """Softmax and product with v, and all that leads to them alone, as one: its nodes -> that product.

        Projections and rotations stay by themselves, so what is left is norms, positions, scores and mask. Empty for
        a softmax that no product follows.
        """
        mixed = self._sole_reader(softmax)
        while mixed is not None and self.wires.nodes[mixed].op in (*VIEWS, "Where"):
            mixed = self._sole_reader(mixed)
        if mixed is None or self.wires.nodes[mixed].op != "MatMul" or self.wires.read_weights(mixed):
            return {}
        found = {mixed}
        for i in reversed(self.members[: self.members.index(mixed)]):
            is_own = i not in taken and self.wires.nodes[i].domain != names.DOMAIN and self._matrix(i) is None
            readers = self._readers(i)
            if is_own and readers and readers <= found:
                found.add(i)
        return dict.fromkeys(sorted(found - {mixed}), mixed)

    def _readers(self, i: int) -> set[int]:
        """The nodes that read what `i` computes; those that only take its size do not count."""
        return {j for j in self.wires.readers[i] if not self.wires.is_size(j)}

    def _sole_reader(self, i: int) -> int | None:
        """The one node that reads what `i` computes, if there is one and it is of the block."""
        readers = self._readers(i)
        return min(readers) if len(readers) == 1 and readers <= self.inside else None

    def _source_of(self, name: str) -> int:
        """The box that a tensor comes from; a new one for what the block gets from elsewhere."""
        if name not in self.source:
            self.source[name] = len(self.drawn.boxes)
            self.drawn.boxes.append(Box(INPUT, self.wires.origin(name)))
        return self.source[name]

    def _add(self, i: int, reads: list[str]) -> int:
        """Draw node `i`, and those that it is host to, as the next box."""
        together = [*self.guests[i], i]
        made = {tensor.name for j in together for tensor in self.wires.nodes[j].outputs}
        sources = [self._source_of(name) for name in reads if name not in made]
        box = len(self.drawn.boxes)
        self.drawn.boxes.append(self._box(i, together))
        self.drawn.edges += [(source, box) for source in dict.fromkeys(sources)]
        return box

    def _add_outputs(self) -> None:
        """One box for each box whose result somebody outside the block reads."""
        left: dict[int, None] = {}
        for i in self.members:
            for tensor in self.wires.nodes[i].outputs:
                read = any(self.wires.reads(j, tensor.name) for j in self._readers(i) - self.inside)
                read |= tensor.name in self.wires.outputs
                if read and tensor.name in self.source:
                    left[self.source[tensor.name]] = None
        for box in left:
            self.drawn.edges.append((box, len(self.drawn.boxes)))
            self.drawn.boxes.append(Box(OUTPUT, "output of the block"))

    # ------------------------------------------------------------------------------------------------------- labels

    def _box(self, i: int, together: list[int]) -> Box:
        node = self.wires.nodes[i]
        if any(self.wires.nodes[j].op == "Softmax" for j in together[:-1]):
            weights = [self._operands(j) for j in together if self.wires.read_weights(j)]
            return Box(STANDARD, "Attention", ", ".join(dict.fromkeys(weights)))
        if node.domain == names.DOMAIN and node.op == "HadamardRotate":
            self.drawn.rotations += 1
            return Box(ROTATION, "Rotate", self._rotation(node))
        fused = node.domain == names.DOMAIN and node.op.endswith(FUSED_ENDINGS)
        if fused and node.op.endswith("Rotate"):
            self.drawn.rotations += 1
            self.drawn.fused_rotations += 1
            return Box(FUSED, _words(node.op), self._rotation(node))
        matrix = next(filter(None, map(self._matrix, together)), None)
        if matrix is None:
            return Box(FUSED if fused else STANDARD, _words(node.op) if fused else node.op, self._operands(i))
        self.drawn.linears += 1
        shape = "{1:,} → {0:,}".format(*self.wires.traced.expression(matrix).shape)
        bits = sorted({weight.bits for weight in self._codes(matrix)})
        detail = f"{'/'.join(map(str, bits))}-bit, {shape}" if bits else f"floating point, {shape}"
        title = f"Linear {_module(matrix).removeprefix(self.prefix)}"
        if fused:
            return Box(FUSED, f"{title} + residual", detail)
        return Box(LINEAR if bits else STANDARD, title, detail)

    def _rotation(self, node: gs.Node) -> str:
        """How many channels a node rotates, and how many together."""
        widths = [int(tensor.shape[-1]) for tensor in node.inputs if tensor.name in self.wires.traced.signs]
        block = int(node.attrs.get("block", 0))
        if not widths or block == widths[0]:
            return f"{block:,} channels"
        return f"{widths[0]:,} channels, only scaled" if block == 1 else f"{widths[0]:,} channels by {block:,}"

    def _codes(self, weight: str) -> Iterator[LinearWeight]:
        linears = self.wires.traced.linears
        return (linears[part] for part in self.wires.traced.parts(weight) if part in linears)

    def _matrix(self, i: int) -> str | None:
        """The placeholder of the weight matrix that a node multiplies by."""
        node, traced = self.wires.nodes[i], self.wires.traced
        for weight in self.wires.read_weights(i):
            if any(self._codes(weight)):
                return weight
            kept = traced.parts(weight)[0] in traced.tensors  # and no part of a quantized weight
            if node.op in PRODUCTS and kept and len(traced.expression(weight).shape) == 2:
                return weight
        return None

    def _matrix_shape(self, i: int) -> tuple[int, ...] | None:
        matrix = self._matrix(i)
        return None if matrix is None else self.wires.traced.expression(matrix).shape

    def _operands(self, i: int) -> str:
        """What a node reads besides data: its weights by name, or one number."""
        weights = [_module(weight).removeprefix(self.prefix) for weight in self.wires.read_weights(i)]
        if weights:
            return ", ".join(dict.fromkeys(weights))
        constants = [tensor.values for tensor in self.wires.nodes[i].inputs if isinstance(tensor, gs.Constant)]
        numbers = [each for each in constants if each.size == 1 and np.issubdtype(each.dtype, np.floating)]
        return f"{float(numbers[0].item()):.3g}" if numbers else ""


def _words(op: str) -> str:
    """GeluRotate -> Gelu Rotate."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", op)
