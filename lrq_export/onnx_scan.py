"""Look through an ONNX file without loading it: whether its tensors are what they claim, and where its data lies.

Walks protobuf's wire format in a mapping of the file and steps over the weights, so a file of any size takes little
memory and no parser has seen it before it is found sound. Refuses what protobuf would read but lrq-export never writes:
a field twice where one counts, sparse tensors, weights that are kept in segments.
"""

import math
import mmap
import reprlib
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from lrq_export.errors import InputError

MOST_FIELDS = 500_000  # of a file; a block of a transformer takes some 2,000
MOST_OF_ALL = 2_200_000  # fields of all files of a package; those of FLUX.1-dev take some 1,700,000
FIELDS_OF_A_TENSOR = 4  # that a look at a tensor takes as long as, besides its own
MOST_NESTED = 40  # messages in one another; ONNX's own limit for functions is below it
MOST_AXES = 64
MOST_ATTRIBUTES = 32  # of a node that stands for an engine
MOST_PLACES = 8  # entries of external data, of which three are known
FORGOTTEN = 1000  # fields; a look at one maps up to 64 KiB around it
MOST_TYPED = 4 << 20  # bytes of values that are stored one by one, which are read to be counted: weights are raw data

# Field numbers of onnx.proto, by the names used here.
GRAPH, FUNCTIONS = 7, 25  # of a model
NODES, INITIALIZERS, SPARSE_INITIALIZERS = 1, 5, 15  # of a graph
FUNCTION_NODES, FUNCTION_ATTRIBUTES = 7, 11
OP_TYPE, ATTRIBUTES = 4, 5  # of a node
EP_CONTEXT = b"EPContext"  # an op_type
ATTRIBUTE_NAME, INTEGER, STRING, REFERENCE = 1, 3, 4, 21
DIMS, DATA_TYPE, SEGMENT, TENSOR_NAME, RAW, EXTERNAL, LOCATION = 1, 2, 3, 8, 9, 13, 14  # of a tensor
KEY, VALUE = 1, 2  # of an entry of a tensor's external data

# The messages inside a message; everything else is stepped over.
INSIDE = {
    "model": {GRAPH: "graph", FUNCTIONS: "function"},
    "graph": {NODES: "node", INITIALIZERS: "tensor", SPARSE_INITIALIZERS: "sparse tensor"},
    "function": {FUNCTION_NODES: "node", FUNCTION_ATTRIBUTES: "attribute"},
    "node": {ATTRIBUTES: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "tensor": {EXTERNAL: "entry"},
    "entry": {},
}
# Fields that count once: of a second one, readers take the last, or a mixture of both.
SINGLE = {
    "model": {GRAPH}, "graph": set(), "function": set(), "node": {OP_TYPE}, "entry": {KEY, VALUE},
    "attribute": {ATTRIBUTE_NAME, INTEGER, STRING, REFERENCE, 5, 6}, "tensor": {DATA_TYPE, TENSOR_NAME, RAW, LOCATION},
}  # fmt: skip
# Bits of a value, by TensorProto.DataType.
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
TEXT, COMPLEX = 8, (14, 15)
# Fields of a tensor that hold values one by one: bytes of each, 0 for variable length, None for messages.
TYPED = {4: 4, 5: 0, 6: None, 7: 0, 10: 8, 11: 0}
VARINT, WIDE, BYTES, NARROW = 0, 1, 2, 5  # protobuf's wire types
# How fields that are looked at may be written, where that is not as bytes alone: protobuf steps over others.
WIRES = {
    "attribute": {INTEGER: {VARINT}},
    "tensor": {DIMS: {VARINT, BYTES}, DATA_TYPE: {VARINT}, LOCATION: {VARINT}, 4: {NARROW, BYTES}, 5: {VARINT, BYTES},
               7: {VARINT, BYTES}, 10: {WIDE, BYTES}, 11: {VARINT, BYTES}},
}  # fmt: skip
# Fields that may occur often and are looked at when their message is whole.
REPEATED = {"node": {ATTRIBUTES}, "tensor": {DIMS, SEGMENT, EXTERNAL, *TYPED}}


def _looked_at(kind: str) -> dict[int, tuple[str | None, bool, bool, set[int]]]:
    """Of each field: the message inside it or None, whether it counts once, whether it is kept, its wire types."""
    inside, single, wires = INSIDE[kind], SINGLE[kind], WIRES.get(kind, {})
    kept = single | REPEATED.get(kind, set())
    return {
        number: (inside.get(number), number in single, number in kept, wires.get(number, {BYTES}))
        for number in inside.keys() | kept
    }


LOOKED_AT = {kind: _looked_at(kind) for kind in INSIDE}  # in one place, for there are a million fields
LAST_BYTES = bytes(range(128))  # what a number of variable length ends with
Range = tuple[int, int]


def check_model_file(path: Path, beside: Collection[str], most: int = MOST_FIELDS) -> int:
    """Raise InputError unless the file is an ONNX model whose every tensor has the bytes that its shape takes.

    `beside`: names of the files in its folder that external data and cached engines may lie in. `most`: fields that it
    may have. Returns how many it has.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            scan = _Scan(path, data, beside, most)
            scan.model()
            return scan.visited
    except _Unsound as error:
        raise InputError(
            f"{path}: not an ONNX model that can be trusted: {error}",
            hint="do not use this package unless you trust its source",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: mmap's word for an empty file
        raise InputError(f"{path}: cannot be read: {error}", hint="fetch the package again") from error


class _Unsound(Exception):
    """What is wrong with a file."""


class _Scan:
    def __init__(self, path: Path, data: mmap.mmap, beside: Collection[str], most: int):
        self.path, self.data, self.beside, self.most = path, data, beside, most
        self.visited, self.typed = 0, 0  # fields, and bytes of values one by one
        self.pause = 0  # fields until the next `rest`

    def model(self) -> None:
        if GRAPH not in self.message("model", 0, len(self.data), 0):
            raise _Unsound("it holds no graph")

    def rest(self) -> None:
        """Raise _Unsound for too many fields; give back what was looked at: its pages are this process's memory."""
        if self.visited > self.most:
            raise _Unsound(f"it has more than {self.most} fields")
        self.data.madvise(mmap.MADV_DONTNEED)
        self.pause = min(self.visited + FORGOTTEN, self.most + 1)

    def message(self, kind: str, begin: int, end: int, depth: int) -> dict[int, list]:
        """What a message holds of SINGLE and REPEATED: numbers, (begin, end) of bytes, and what messages hold."""
        if kind not in INSIDE:
            raise _Unsound(f"it holds a {kind}")
        if depth > MOST_NESTED:
            raise _Unsound(f"more than {MOST_NESTED} messages are nested in one another")
        found: dict[int, list] = defaultdict(list)
        looked_at = LOOKED_AT[kind]
        for number, wire, value in self.fields(begin, end):
            if number not in looked_at:
                continue
            inner, once, kept, wires = looked_at[number]
            if wire not in wires:
                raise _Unsound(f"field {number} of a {kind} is of another kind")
            if inner is not None:
                value = self.message(inner, *value, depth + 1)
            if once and found[number]:
                raise _Unsound(f"field {number} of a {kind} occurs twice")
            if kept:
                found[number].append(value)
        if kind == "tensor":
            self.visited += FIELDS_OF_A_TENSOR
            self.tensor(found)
        if kind == "node" and any(map(self.is_cached_engine, found[OP_TYPE])):
            self.cached_engine(found)
        return found

    def fields(self, begin: int, end: int) -> Iterator[tuple[int, int, int | Range]]:
        """Every field of a message: (number, wire type, its value or the range of its bytes)."""
        place, data = begin, self.data
        while place < end:
            self.visited += 1
            if self.visited >= self.pause:
                self.rest()
            tag, place = data[place], place + 1
            if tag > 127:  # most take one byte
                tag, place = self.varint(place - 1, end)
            if tag >= 2**32:  # of which protobuf in C++ keeps the lower half: another field than is read here
                raise _Unsound(f"the tag before byte {place} has more than 32 bits")
            number, wire = tag >> 3, tag & 7
            if wire == VARINT:
                value, place = self.varint(place, end)
            elif wire in (WIDE, NARROW):
                size = 8 if wire == WIDE else 4
                value, place = (place, place + size), place + size
            elif wire == BYTES:
                length, place = data[place] if place < end else 128, place + 1
                if length > 127:
                    length, place = self.varint(place - 1, end)
                value, place = (place, place + length), place + length
            else:
                raise _Unsound(f"byte {place} is of no known kind")
            if number == 0 or place > end:
                raise _Unsound(f"it is damaged or cut off before byte {min(place, end)}")
            yield number, wire, value

    def varint(self, place: int, end: int) -> tuple[int, int]:
        """A number of variable length, as unsigned 64 bits, and the place after it."""
        value = 0
        for shift in range(0, 70, 7):
            if place >= end:
                raise _Unsound(f"it is cut off at byte {end}")
            byte = self.data[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (2**64 - 1), place
        raise _Unsound(f"the number at byte {place} has no end")

    def numbers(self, values: list) -> list[int]:
        """A repeated integer, packed or not."""
        found = []
        for value in values:
            if isinstance(value, int):
                found.append(value)
                continue
            place, end = value
            while place < end and len(found) <= MOST_AXES:
                number, place = self.varint(place, end)
                found.append(number)
        return found

    def text(self, found: dict[int, list], number: int) -> str:
        """A string field, "" if there is none; of a very long one the beginning."""
        values = found.get(number, [])
        if not values or isinstance(values[0], int):
            return ""
        begin, end = values[0]
        return self.data[begin : min(end, begin + 1000)].decode("utf-8", "replace")

    def tensor(self, found: dict[int, list]) -> None:
        """Raise _Unsound unless a tensor has a known type, a possible shape, and as many values as that says."""
        name = reprlib.repr(self.text(found, TENSOR_NAME))
        dims = self.numbers(found[DIMS])
        kind = (self.numbers(found[DATA_TYPE]) or [0])[0]
        if kind not in BITS and kind != TEXT:
            raise _Unsound(f"tensor {name} has the type {kind}")
        if len(dims) > MOST_AXES or any(size >= 2**63 for size in dims):
            raise _Unsound(f"tensor {name} has the shape {reprlib.repr(dims)}")
        count = math.prod(dims)
        needed = -(-count * BITS.get(kind, 8) // 8)
        external = (self.numbers(found[LOCATION]) or [0])[0]
        typed = sum(self.count(number, found[number]) for number in TYPED)
        if found[SEGMENT] or external not in (0, 1) or (found[EXTERNAL] and not external):
            raise _Unsound(f"tensor {name} is stored in a way that lrq-export never uses")
        if external:
            if found[RAW] or typed or kind == TEXT:
                raise _Unsound(f"tensor {name} is stored twice")
            self.external(name, needed, found[EXTERNAL])
        elif found[RAW]:
            begin, end = found[RAW][0] if isinstance(found[RAW][0], tuple) else (0, -1)
            if typed or kind == TEXT or end - begin != needed:
                raise _Unsound(f"tensor {name} has {end - begin} bytes, its shape {reprlib.repr(dims)} takes {needed}")
        else:
            per_entry = {4: 2, 2: 4}.get(BITS.get(kind, 8), 1)
            entries = 2 * count if kind in COMPLEX else -(-count // per_entry)
            if typed != entries:
                raise _Unsound(f"tensor {name} has {typed} values, its shape {reprlib.repr(dims)} takes {entries}")

    def count(self, number: int, values: list) -> int:
        """How many values a typed field of a tensor holds, packed or not."""
        total = 0
        for value in values:
            self.typed += 0 if isinstance(value, int) else value[1] - value[0]
            if self.typed > MOST_TYPED:
                raise _Unsound(f"more than {MOST_TYPED} bytes of values are stored one by one")
            if isinstance(value, int) or TYPED[number] is None:
                total += 1
            elif TYPED[number]:
                total += (value[1] - value[0]) // TYPED[number]
            else:
                total += sum(
                    len(piece) - len(piece.translate(None, LAST_BYTES)) for piece in self.pieces(value, size=1 << 20)
                )
        return total

    def pieces(self, span: Range, size: int) -> Iterator[bytes]:
        for begin in range(*span, size):
            yield self.data[begin : min(begin + size, span[1])]

    def external(self, name: str, needed: int, entries: list[dict[int, list]]) -> None:
        """Raise _Unsound unless a tensor's bytes lie whole in a file of the package beside the model."""
        facts: dict[str, str] = {}
        if len(entries) > MOST_PLACES:
            raise _Unsound(f"tensor {name} lies in more than {MOST_PLACES} places")
        for entry in entries:
            if facts.setdefault(self.text(entry, KEY), self.text(entry, VALUE)) != self.text(entry, VALUE):
                raise _Unsound(f"tensor {name} lies in two places")
        others = facts.keys() - {"location", "offset", "length"}
        if others:  # ONNX Runtime reads what it packed before from places that further keys name
            raise _Unsound(f"the place of tensor {name} has {reprlib.repr(min(others))}")
        location = facts.get("location", "")
        if location not in self.beside:
            raise _Unsound(f"tensor {name} lies in {reprlib.repr(location)}, which is no file of the package beside it")
        numbers = [facts.get("offset", "0"), facts.get("length", str(needed))]
        if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers):
            raise _Unsound(f"tensor {name} lies at {reprlib.repr(numbers)}")
        offset, length = map(int, numbers)
        size = (self.path.parent / location).stat().st_size
        if length != needed or offset + length > size:
            raise _Unsound(
                f"tensor {name} takes {needed} bytes and has {length} at {offset} of {location}, which has {size}"
            )

    def is_cached_engine(self, op_type: Range) -> bool:
        begin, end = op_type
        return end - begin == len(EP_CONTEXT) and self.data[begin:end] == EP_CONTEXT

    def cached_engine(self, found: dict[int, list]) -> None:
        """Raise _Unsound unless a node that stands for an engine names one of the package, beside the model."""
        if len(found[ATTRIBUTES]) > MOST_ATTRIBUTES:
            raise _Unsound(f"an EPContext node has more than {MOST_ATTRIBUTES} attributes")
        facts = {self.text(each, ATTRIBUTE_NAME): each for each in found[ATTRIBUTES]}
        if any(each[REFERENCE] for each in found[ATTRIBUTES]):  # a function's caller would say what they are
            raise _Unsound("an attribute of an EPContext node refers to another")
        if len(facts) != len(found[ATTRIBUTES]):
            raise _Unsound("an attribute of an EPContext node occurs twice")
        if facts.get("embed_mode", {}).get(INTEGER, [1]) != [0]:  # 1 is what is meant where nothing is said
            raise _Unsound("it holds an engine itself, needed a file beside it")
        location = self.text(facts.get("ep_cache_context", {}), STRING)
        if location not in self.beside:
            raise _Unsound(f"its engine is {reprlib.repr(location)}, which is no file of the package beside it")
