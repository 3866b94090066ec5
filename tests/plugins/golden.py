"""Golden vectors for the conformance host: examples of every op and their numpy references.

`host/cases.cpp` reads what `write_cases` writes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from graphs import names
from graphs.ops import OPS, words
from graphs.ops.packing import unpack_elements
from graphs.ops.spec import Example, OpSpec

NUMPY_TYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# By numpy's name, as nvinfer1::DataType numbers them.
TENSORRT_TYPES = {"float32": 0, "float16": 1, "int8": 2, "bfloat16": 7, "int4": 9}
KINDS = {int: 0, float: 1, str: 2}
BFLOAT16_STEPS = 8.0**2  # its rounding is 8 times as coarse as that of float16; NMSE is of squares


@dataclass(frozen=True)
class Case:
    """One node with its inputs, and how far its output may be off."""

    label: str
    spec: OpSpec
    example: Example
    nmse: float


def all_cases() -> list[Case]:
    """Every op in every type, and of linear ops the layout and rotation that only plugins have."""
    rng = np.random.default_rng(0)
    return [
        Case(f"{name}.{index}.{kind}", spec, typed(spec, example, kind), tolerance(spec, kind))
        for name, spec in OPS.items()
        for index, example in enumerate([*spec.examples(rng), *for_plugins(spec, rng)])
        for kind in (NUMPY_TYPES if "T" in spec.type_vars else ["float"])
        if kind == "float" or example.attributes.get("rotation", "none") == "none"  # rounded in the reference
    ]


def for_plugins(spec: OpSpec, rng: np.random.Generator) -> Iterator[Example]:
    """Of a linear op: codes in words, and a rotation in the node."""
    own = {attribute.name for attribute in spec.attributes}
    for example in spec.examples(rng) if "rotation" in own else []:
        if "layout" in own:
            yield in_words(spec, example)
        block = math.gcd(example.attributes["cols"], 8)
        yield Example(example.inputs, {**example.attributes, "rotation": "hadamard", "block": block})


def in_words(spec: OpSpec, example: Example) -> Example:
    at = [tensor.name for tensor in spec.inputs].index("codes")
    bits, cols = example.attributes["bits"], example.attributes["cols"]
    packed = words.prepack(unpack_elements(example.inputs[at], bits, cols), bits)
    inputs = (*example.inputs[:at], packed, *example.inputs[at + 1 :])
    return Example(inputs, {**example.attributes, "layout": names.WORDS})


def typed(spec: OpSpec, example: Example, kind: str) -> Example:
    """The example with T of one type."""
    inputs = [
        array.astype(NUMPY_TYPES[kind]) if tensor.type == "T" else array
        for tensor, array in zip(spec.inputs, example.inputs, strict=True)
    ]
    return Example(tuple(inputs), example.attributes)


def tolerance(spec: OpSpec, kind: str) -> float:
    if kind != "bfloat16":
        return spec.tolerance.nmse[kind]
    return BFLOAT16_STEPS * spec.tolerance.nmse["float16"]


def write_cases(path: Path, cases: list[Case]) -> None:
    path.write_bytes(struct.pack("<I", len(cases)) + b"".join(_case(case) for case in cases))


def _case(case: Case) -> bytes:
    spec, example = case.spec, case.example
    output = spec.reference(*example.inputs, **example.attributes)
    given = spec.node_attributes(**example.attributes)
    attributes = [(attribute, given[attribute.name]) for attribute in spec.attributes]
    inputs = zip(spec.inputs, example.inputs, strict=True)
    return b"".join([
        _text(case.label), _text(spec.name),
        struct.pack("<I", len(attributes)), *(_attribute(attribute, value) for attribute, value in attributes),
        struct.pack("<I", len(spec.inputs)), *(_tensor(tensor.name, array) for tensor, array in inputs),
        _tensor(spec.outputs[0].name, output), struct.pack("<d", case.nmse),
    ])  # fmt: skip


def _attribute(attribute, value) -> bytes:
    encoded = _text(value) if attribute.kind is str else struct.pack("<i" if attribute.kind is int else "<f", value)
    return _text(attribute.name) + struct.pack("<B", KINDS[attribute.kind]) + encoded


def _tensor(name: str, array: np.ndarray) -> bytes:
    raw = _nibbles(array) if array.dtype == ml_dtypes.int4 else np.ascontiguousarray(array).tobytes()
    form = struct.pack(f"<ii{array.ndim}q", TENSORRT_TYPES[array.dtype.name], array.ndim, *array.shape)
    return _text(name) + form + struct.pack("<Q", len(raw)) + raw


def _nibbles(array: np.ndarray) -> bytes:
    """INT4 elements two a byte, low first, as ONNX and TensorRT hold them."""
    flat = array.astype(np.int8).ravel().view(np.uint8) & 15
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return (flat[0::2] | flat[1::2] << 4).tobytes()


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()
