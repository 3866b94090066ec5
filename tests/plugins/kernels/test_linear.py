"""lrqLinear computes what the linear ops of the dialect say: every format, layout, residency and tactic."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
from kernel_machine import NOTHING, TYPES, nmse

from graphs.ops import OPS, packing, words
from graphs.ops.token_product import quantize_tokens
from graphs.ops.twin_log_dequant import random_exponents
from lrq_export.kernels import (
    Format,
    KernelError,
    Layout,
    Linear,
    Modulation,
    Status,
    Tactic,
    Tokens,
    Type,
    Weight,
    split_tokens,
)

FORMATS = {"TwinLog": Format.TWIN_LOG, "Codebook": Format.CODEBOOK, "Int8": Format.INT8}
OP_NAMES = [f"{name}Linear{end}" for name in FORMATS for end in ("", "Residual")]
# Sums and roundings are those of the reference, but that numpy adds no product to a sum in one rounding either.
TOLERANCE = {Type.FLOAT: 1e-14, Type.HALF: 1e-9, Type.BFLOAT16: 1e-9}


@dataclass
class Call:
    """One linear op in numpy: its inputs by name, x (..., cols) and all that follows, and its attributes."""

    op: str
    inputs: dict[str, np.ndarray]
    attributes: dict[str, object]
    layout: Layout = Layout.STORAGE
    tactic: Tactic = Tactic.AUTO
    resident: bool = False  # residency int8
    quantized: bool = False  # x comes as codes
    kept: list = field(default_factory=list)

    @property
    def format(self) -> Format:
        return next(value for name, value in FORMATS.items() if self.op.startswith(name))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.inputs["x"].shape[:-1], int(self.attributes["rows"]))

    def arrays(self, kind: Type) -> list[np.ndarray]:
        """The inputs in the types of a node."""
        of_type = {"x", "gate", "residual"}
        return [a.astype(TYPES[kind]) if name in of_type else a for name, a in self.inputs.items()]

    def reference(self, kind: Type) -> np.ndarray:
        return OPS[self.op].reference(*self.arrays(kind), **self.attributes)

    def run(self, machine, kind: Type) -> np.ndarray:
        self.kept.clear()
        y = machine.empty(self.shape, TYPES[kind])
        linear = self.struct(machine, kind, y)
        size = machine.kernels.workspace(linear)
        workspace = machine.empty((size,), np.uint8)
        machine.kernels.linear(linear, workspace.address, size)
        machine.read(workspace)  # its fences
        return machine.read(y)

    def struct(self, machine, kind: Type, y) -> Linear:
        named = dict(zip(self.inputs, self.arrays(kind), strict=True))
        weight = self._weight(machine, named)
        tokens, gate = Tokens(1, int(np.prod(self.shape[:-1]))), Modulation()
        if "gate" in named:
            tokens, [strides] = split_tokens(self.shape[:-1], [named["gate"].shape])
            gate = Modulation(self._put(machine, named["gate"]), *strides)
        x, codes, scales = self._activations(machine, named["x"])
        rotated = self.attributes.get("rotation", "none") != "none"
        return Linear(
            x=x, quantized=codes, token_scales=scales, weight=weight, decoded=self._decoded(machine, weight),
            row_scales=self._put(machine, named["scale"]), bias=self._put(machine, named["bias"]), gate=gate,
            residual=self._put(machine, named.get("residual")), y=y.address, tokens=tokens,
            block=self.attributes["block"] if rotated else 0, type=kind, act_bits=self.attributes["act_bits"],
            tactic=self.tactic,
        )  # fmt: skip

    def _put(self, machine, array: np.ndarray | None) -> int | None:
        self.kept.append(NOTHING if array is None else machine.put(array))
        return self.kept[-1].address

    def _activations(self, machine, x: np.ndarray) -> tuple[int | None, ...]:
        if not self.quantized:
            return self._put(machine, x), None, None
        codes, scales = quantize_tokens(x, self.attributes["act_bits"])
        return None, self._put(machine, codes), self._put(machine, scales)

    def _weight(self, machine, named: dict[str, np.ndarray]) -> Weight:
        codes, a = named["codes"], self.attributes
        if codes.dtype == ml_dtypes.int4:
            nibbles = codes.astype(np.uint8).reshape(-1) & 15
            nibbles = np.pad(nibbles, (0, nibbles.size % 2))
            codes = nibbles[0::2] | nibbles[1::2] << 4
        levels = named.get("exponents", named.get("table"))
        int8 = self.format == Format.INT8
        return Weight(
            self._put(machine, codes), self._put(machine, levels), a["rows"], a["cols"],
            0 if int8 else a["group_size"], self.format, self.layout, 8 if int8 else a["bits"],
            a.get("fraction_bits", 4), a.get("integer_bits", 6),
        )  # fmt: skip

    def _decoded(self, machine, weight: Weight) -> int | None:
        if not self.resident:
            return None
        self.kept.append(machine.empty((weight.rows, weight.cols), np.int8))
        machine.kernels.decode(weight, self.kept[-1].address)
        return self.kept[-1].address


def calls(op: str) -> list[Call]:
    """The examples of an op, which its ONNX body is held against too."""
    spec, rng = OPS[op], np.random.default_rng(0)
    names = [tensor.name for tensor in spec.inputs]
    return [
        Call(op, dict(zip(names, e.inputs, strict=True)), spec.node_attributes(**e.attributes))
        for e in spec.examples(rng)
    ]


def without_plugin_fields(call: Call) -> Call:
    call.attributes = {name: value for name, value in call.attributes.items() if not name.startswith("plugin_")}
    return call


def call_of(tokens: int, rows: int, cols: int, group_size: int, bits: int, op: str = "TwinLogLinear") -> Call:
    """A call of any size with codes in words."""
    spec, rng = OPS[op], np.random.default_rng(tokens + rows)
    codes = rng.integers(0, 1 << bits, (rows, cols))
    inputs = {
        "x": rng.standard_normal((tokens, cols), np.float32),
        "codes": words.prepack(codes, bits),
        "exponents": random_exponents(rng, rows, cols // group_size, bits),
        "scale": rng.uniform(0.001, 0.01, rows).astype(np.float32),
        "bias": rng.standard_normal(rows, np.float32),
    }
    if op.endswith("Residual"):
        inputs["gate"] = rng.uniform(1, 2, rows).astype(np.float32)
        inputs["residual"] = rng.standard_normal((tokens, rows), np.float32)
    attributes = spec.node_attributes(
        bits=bits, group_size=group_size, rows=rows, cols=cols, act_bits=8, layout="words"
    )
    return without_plugin_fields(Call(op, inputs, attributes, Layout.WORDS))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("op", OP_NAMES)
def test_every_example_of_an_op_is_computed(machine, op, kind):
    for call in map(without_plugin_fields, calls(op)):
        assert nmse(call.run(machine, kind), call.reference(kind)) <= TOLERANCE[kind]


@pytest.mark.parametrize("op", OP_NAMES)
def test_residencies_and_quantized_activations_give_the_same_numbers(machine, op):
    for call in map(without_plugin_fields, calls(op)[:3]):
        packed = call.run(machine, Type.HALF)
        call.resident = True
        np.testing.assert_array_equal(call.run(machine, Type.HALF), packed)
        if call.inputs["x"].dtype == np.float32:
            call.quantized, call.resident = True, False
            call.inputs["x"] = call.inputs["x"].astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(call.run(machine, Type.HALF), packed)


def test_one_perturbed_code_changes_one_output_channel(machine):
    call = call_of(5, 16, 128, 128, 4)
    needed = call.reference(Type.FLOAT)
    call.inputs["codes"][3, 10] ^= 1
    for tactic in (Tactic.FEW_TOKENS, Tactic.ANY_SIZE):
        call.tactic = tactic
        different = call.run(machine, Type.FLOAT) != needed
        assert np.unique(np.argwhere(different)[:, 1]).tolist() == [3]


# (tokens, rows, cols, group_size): each tile of tokens, rows that fill no tile, lanes beyond the last run, groups.
FEW = [(1, 16, 128, 128), (5, 40, 384, 384), (16, 33, 256, 64), (17, 64, 1152, 1152), (64, 130, 256, 128)]
MOST_TABLES = (64, 8, 1408, 32)  # 44 of a row: beyond what a kernel has without asking for it


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("shape", [*FEW, MOST_TABLES], ids=str)
def test_few_tokens_are_multiplied_by_packed_codes(machine, shape, bits):
    call = call_of(*shape, bits)
    call.tactic = Tactic.FEW_TOKENS
    np.testing.assert_array_equal(call.run(machine, Type.FLOAT), call.reference(Type.FLOAT))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_few_tokens_end_in_a_gate_and_residual(machine, kind):
    call = call_of(9, 24, 128, 32, 4, "TwinLogLinearResidual")
    call.tactic = Tactic.FEW_TOKENS
    assert nmse(call.run(machine, kind), call.reference(kind)) <= TOLERANCE[kind]


@pytest.mark.parametrize("bits", [4, 3])
def test_large_weights_are_decoded_and_multiplied_in_parts(machine, bits):
    """The emulated library decodes 4096 bytes at a time: three parts of 256, 256 and 88 rows."""
    call = call_of(2, 600, 16, 16, bits, "TwinLogLinearResidual")
    call.tactic = Tactic.ANY_SIZE
    np.testing.assert_array_equal(call.run(machine, Type.FLOAT), call.reference(Type.FLOAT))
    call.inputs["codes"] = np.frombuffer(
        packing.pack(words.unpack_words(call.inputs["codes"], bits, 16), bits).raw, np.uint8
    )
    call.layout = Layout.STORAGE
    np.testing.assert_array_equal(
        call.run(machine, Type.FLOAT), call_of(2, 600, 16, 16, bits, call.op).reference(Type.FLOAT)
    )


def test_a_fused_rotation_is_rounded_to_the_type_of_x_first(machine):
    for kind in TYPES:
        call = call_of(3, 8, 144, 144, 4)
        call.attributes |= {"rotation": "hadamard", "block": 72}
        assert nmse(call.run(machine, kind), call.reference(kind)) <= 1e-5  # a code next to a tie may differ by one


def test_no_token_is_no_work(machine):
    call = call_of(1, 8, 128, 128, 4)
    call.inputs["x"] = call.inputs["x"][:0]
    assert call.run(machine, Type.HALF).shape == (0, 8)


@pytest.mark.parametrize(
    ("tactic", "shape"),
    [
        (Tactic.FEW_TOKENS, (65, 16, 128, 128)),
        (Tactic.FEW_TOKENS, (1, 16, 96, 16)),
        (Tactic.FEW_TOKENS, (64, 16, 1536, 32)),  # 128 rows of 48 tables and one of zeros: 16 bytes over 96 KiB
        (Tactic.TILE_128_128, (1, 16, 120, 120)),
    ],
)
def test_a_tactic_that_does_not_fit_is_a_named_error(machine, tactic, shape):
    call = call_of(*shape, 4)
    call.tactic = tactic
    with pytest.raises(KernelError, match=rf"tactic {int(tactic)} has no kernel") as refused:
        call.run(machine, Type.HALF)
    assert refused.value.status == Status.NOT_COMPILED


SEEDS = range(12)


def random_call(seed: int) -> tuple[Call, Type, bool]:
    """A call of random sizes, its type, and whether few tokens of it have a kernel of their own."""
    rng = np.random.default_rng(seed)
    bits = 4 - seed // 2 % 3
    tokens, rows = (0, 1, 2, 7, 8, 9, 33, 64, 65)[7 * seed % 9], int(rng.integers(1, 70))  # each once in nine seeds
    is_whole = seed % 2 == 0  # whole runs of codes
    group_size = 32 * int(rng.integers(1, 4)) if is_whole else 2 * int(rng.integers(0, 20)) + 1
    cols = group_size * int(rng.integers(1, 4)) * (4 if is_whole else 1)
    op = str(rng.choice(["TwinLogLinear", "TwinLogLinearResidual"]))
    call = call_of(tokens, rows, cols, group_size, bits, op)
    return call, list(TYPES)[int(rng.integers(len(TYPES)))], is_whole and 0 < tokens <= 64


@pytest.mark.parametrize("seed", SEEDS)
def test_layers_of_random_sizes_are_computed(machine, seed):
    call, kind, are_few = random_call(seed)
    needed = call.reference(kind) if call.inputs["x"].size else np.zeros(call.shape)
    for call.tactic in [Tactic.AUTO, Tactic.ANY_SIZE] + [Tactic.FEW_TOKENS] * are_few:
        assert nmse(call.run(machine, kind), needed) <= TOLERANCE[kind], (call.tactic.name, call.attributes)


def test_random_sizes_have_no_token_odd_widths_and_few_tokens_among_them():
    drawn = [random_call(seed) for seed in SEEDS]
    assert {0, 1} <= {call.shape[0] for call, _, _ in drawn}
    assert any(call.attributes["cols"] % 2 for call, _, _ in drawn)
    assert {call.attributes["bits"] for call, _, are_few in drawn if are_few} == {2, 3, 4}
