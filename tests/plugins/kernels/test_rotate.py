"""lrqRotate computes what the rotation ops of the dialect say, on the CPU by the emulator and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from kernel_machine import NOTHING, TYPES, nmse

from graphs.ops import OPS
from graphs.ops.hadamard import factorize, transform
from graphs.ops.token_product import quantize_tokens
from lrq_export.kernels import KernelError, Modulation, Prologue, Rotation, Status, Tokens, Type, split_tokens

PROLOGUES = {
    "HadamardRotate": Prologue.NONE,
    "LayerNormRotate": Prologue.LAYER_NORM,
    "RMSNormRotate": Prologue.RMS_NORM,
    "GeluRotate": Prologue.GELU,
    "GeluTanhRotate": Prologue.GELU_TANH,
    "SiluRotate": Prologue.SILU,
    "GegluRotate": Prologue.GEGLU,
}
NORMS = (Prologue.LAYER_NORM, Prologue.RMS_NORM)
TOLERANCE = {Type.FLOAT: 1e-12, Type.HALF: 1e-6, Type.BFLOAT16: 1e-6}  # float16 as the ops have it


@dataclass
class Call:
    """The inputs of one rotation in numpy."""

    prologue: Prologue
    x: np.ndarray
    signs: np.ndarray | None
    block: int
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    epsilon: float = 0.0

    @property
    def channels(self) -> int:
        return self.x.shape[-1] // (2 if self.prologue == Prologue.GEGLU else 1)

    def run(self, machine, kind: Type, act_bits: int = 0):
        """y of x's leading shape, and the tokens' scales if it is quantized."""
        put = lambda array: NOTHING if array is None else machine.put(array.astype(TYPES[kind]))  # noqa: E731
        lead, modulations = self.x.shape[:-1], [m for m in (self.scale, self.shift) if m is not None]
        tokens, strides = split_tokens(lead, [m.shape for m in modulations])
        inputs = [put(array) for array in (self.x, self.signs, self.scale, self.shift)]
        x, signs, scale, shift = (buffer.address for buffer in inputs)
        y = machine.empty((*lead, self.channels), np.int8 if act_bits else TYPES[kind])
        scales = machine.empty((*lead, 1), np.float32)
        rows = [Modulation(data, *stride) for data, stride in zip((scale, shift), strides, strict=bool(strides))]
        rotation = Rotation(
            x, *(rows or (Modulation(), Modulation())), signs, y.address, scales.address if act_bits else None, tokens,
            self.channels, self.block, self.prologue, self.epsilon, kind, act_bits,
        )  # fmt: skip
        machine.kernels.rotate(rotation)
        return machine.read(y), machine.read(scales)


def calls(op: str) -> list[Call]:
    """The examples of an op, which its ONNX body is held against too."""
    found = []
    for example in OPS[op].examples(np.random.default_rng(0)):
        x, *modulations, signs = example.inputs
        scale, shift = modulations or (None, None)
        epsilon = example.attributes.get("epsilon", 0.0)
        found.append(Call(PROLOGUES[op], x, signs, example.attributes["block"], scale, shift, epsilon))
    return found


def reference(op: str, kind: Type) -> list[np.ndarray]:
    return [
        OPS[op].reference(*(array.astype(TYPES[kind]) for array in example.inputs), **example.attributes)
        for example in OPS[op].examples(np.random.default_rng(0))
    ]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("op", PROLOGUES)
def test_every_example_of_an_op_is_computed(machine, op, kind):
    for call, needed in zip(calls(op), reference(op, kind), strict=True):
        y, _ = call.run(machine, kind)
        assert nmse(y, needed) <= TOLERANCE[kind]


@pytest.mark.parametrize("op", PROLOGUES)
def test_one_perturbed_input_is_seen(machine, op):
    call, needed = calls(op)[0], reference(op, Type.FLOAT)[0]
    x = call.x.copy()
    x[..., 3] += 0.25
    y, _ = replace(call, x=x).run(machine, Type.FLOAT)
    assert nmse(y, needed) > 100 * TOLERANCE[Type.FLOAT]


@pytest.mark.parametrize(("kind", "act_bits"), [(Type.FLOAT, 8), (Type.HALF, 8), (Type.BFLOAT16, 6), (Type.HALF, 4)])
@pytest.mark.parametrize("op", ["HadamardRotate", "LayerNormRotate", "GegluRotate"])
def test_codes_are_those_of_the_rotated_tokens(machine, op, kind, act_bits):
    for call in calls(op)[:4]:
        rotated, _ = call.run(machine, kind)
        codes, scales = call.run(machine, kind, act_bits)
        needed, needed_scales = quantize_tokens(rotated, act_bits)
        np.testing.assert_array_equal(codes, needed)
        np.testing.assert_array_equal(scales, needed_scales)


def tokens_near_ties(rng: np.random.Generator, tokens: int, channels: int) -> np.ndarray:
    """Tokens whose x / s is an odd multiple of 1/2, or beside it: where a quotient that is not exact rounds wrong."""
    peak = np.ldexp(rng.uniform(1, 2, (tokens, 1)), rng.integers(-50, 50, (tokens, 1))).astype(np.float32)
    scale = peak / np.float32(127)
    x = (rng.integers(-127, 127, (tokens, channels)) + np.float32(0.5)).astype(np.float32) * scale
    x = (x.view(np.int32) + rng.integers(-2, 3, x.shape)).astype(np.int32).view(np.float32)
    x[:, :1] = peak
    return x


def test_quotients_beside_a_tie_round_as_divisions_do(machine):
    x = tokens_near_ties(np.random.default_rng(1), 40, 4096)
    codes, scales = Call(Prologue.NONE, x, None, 1).run(machine, Type.FLOAT, 8)
    needed, needed_scales = quantize_tokens(x, 8)
    np.testing.assert_array_equal(codes, needed)
    np.testing.assert_array_equal(scales, needed_scales)
    approximate = np.rint(x * (np.float32(1) / needed_scales))
    assert (approximate != needed).any(), "no input tells a division from a product with the reciprocal"


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-20, 1e20, 3e38])
def test_tokens_of_any_size_are_quantized(machine, size):
    x = np.random.default_rng(2).uniform(-1, 1, (3, 48)).astype(np.float32) * np.float32(size)
    codes, scales = Call(Prologue.NONE, x, None, 1).run(machine, Type.FLOAT, 8)
    needed, needed_scales = quantize_tokens(x, 8)
    np.testing.assert_array_equal(codes, needed)
    np.testing.assert_array_equal(scales, needed_scales)


# (channels, block) by the kernel that takes them.
# Runs: several a thread, a token's last warp partly idle, the widest block that is shuffled.
# Columns: 16 and 32 values a thread, columns that end within a warp, every base with narrow and wide parts, parts
# smaller than a run; several tokens a block; columns that threads split, of one token and of several blocks.
# Shared memory: odd widths, H_K alone, a base that no list has, tokens too wide.
RUNS = [(16400, 16), (32768, 16), (80, 16), (96, 32), (20480, 512), (20480, 64)]
TOGETHER = [(128, 64), (1024, 128), (1152, 128), (1536, 256)]
SPLIT = [(2240, 2240), (8960, 8960), (13824, 13824), (2432, 2432), (9728, 9728), (4864, 1216), (1216, 304), (560, 140)]
COLUMNS = [(64, 64), (1088, 64), (1600, 64), (3072, 128), (9216, 256), (512, 512), (1024, 1024)]
COLUMNS += [(4096, 2048), (768, 768), (1536, 1536), (3072, 3072), (6144, 3072), (640, 640), (5120, 5120), (896, 896)]
COLUMNS += [(3584, 1792), (576, 576), (1152, 1152), (4608, 4608), (1408, 1408), (2816, 352), (960, 960), (3840, 3840)]
COLUMNS += [(1920, 960), (192, 192), (16384, 16384), (48, 48), (384, 384), (80, 40), (112, 56), (144, 36), (240, 60)]
COLUMNS += [(288, 72), (432, 216), (12288, 192), *TOGETHER, *SPLIT]  # 12288: 48 KiB of shared memory
SHARED = [(24, 8), (1152, 24), (20, 20), (140, 140), (30720, 3072), (32784, 16), (1664, 1664), (27648, 13824)]
SHARED += [(24576, 24576), (19584, 1152), (21504, 1024)]  # too many bytes for columns, then too many threads


@pytest.mark.parametrize(("channels", "block"), RUNS + COLUMNS + SHARED)
def test_every_size_is_rotated(machine, channels, block):
    rng = np.random.default_rng(channels)
    x, signs = rng.standard_normal((2, channels), np.float32), rng.choice(np.float32([-1, 1]), channels)
    call = Call(Prologue.NONE, x, signs, block)
    y, _ = call.run(machine, Type.FLOAT)
    assert nmse(y, transform(x * signs, block)) <= 1e-12
    for got, needed in zip(call.run(machine, Type.FLOAT, 8), quantize_tokens(y, 8), strict=True):
        np.testing.assert_array_equal(got, needed)


KERNELS = {
    "runs": ("RotateArguments",),
    "columns": ("RotateArguments", "int"),
    "shared": ("RotateArguments", "HadamardFactors"),
}


@pytest.mark.parametrize(("kernel", "sizes"), [("runs", RUNS), ("columns", COLUMNS), ("shared", SHARED)])
def test_every_size_goes_to_the_kernel_that_is_made_for_it(emulated, kernel, sizes):
    for channels, block in sizes:
        Call(Prologue.NONE, np.zeros((1, channels), np.float32), None, block).run(emulated, Type.FLOAT)
        assert emulated.launched()[0] == KERNELS[kernel], (channels, block)


def test_a_block_that_no_shared_memory_holds_is_refused(emulated):
    call = Call(Prologue.NONE, np.zeros((1, 27648), np.float32), None, 27648)
    with pytest.raises(KernelError, match="block 27648 needs 115072 bytes of shared memory, this device has 101376"):
        call.run(emulated, Type.FLOAT)


# 16 channels a thread of a token of few, 32 of 8 tokens of few, 32 of one of many, 48, 36, 38, 27 and 28 of whole rows.
THREADS = [(1088, 64, 96), (1152, 128, 288), (3072, 128, 96), (3072, 3072, 64), (1152, 1152, 32), (2432, 2432, 64)]
THREADS += [(13824, 13824, 512), (8960, 8960, 320)]


@pytest.mark.parametrize(("channels", "block", "threads"), THREADS)
def test_threads_of_a_block_are_as_many_as_its_channels_ask_for(emulated, channels, block, threads):
    Call(Prologue.NONE, np.zeros((1, channels), np.float32), None, block).run(emulated, Type.FLOAT)
    assert emulated.launched()[1] == threads


@pytest.mark.parametrize("tokens", [7, 8, 17])
@pytest.mark.parametrize(("channels", "block"), TOGETHER)
def test_tokens_of_one_block_keep_to_themselves(machine, channels, block, tokens):
    """Tokens of very different sizes: one that took part in another's scale would be seen."""
    rng = np.random.default_rng(tokens)
    size = np.float32(10) ** rng.permutation(tokens)[:, None].astype(np.float32)
    x = rng.standard_normal((tokens, channels), np.float32) * size
    call = Call(Prologue.NONE, x, None, block)
    y, _ = call.run(machine, Type.FLOAT)
    assert max(map(nmse, y / size, transform(x / size, block))) <= 1e-12
    for got, codes in zip(call.run(machine, Type.FLOAT, 8), quantize_tokens(y, 8), strict=True):
        np.testing.assert_array_equal(got, codes)


# Runs, then one layout of every kind of vector: 16 to 2 bytes of a column.
PROLOGUE_SIZES = [(1152, 16), (1600, 64), (1152, 128), (2048, 256), (512, 512), (1536, 1536), (1152, 1152)]
PROLOGUE_SIZES += [(2240, 2240)]  # split


@pytest.mark.parametrize(("channels", "block"), PROLOGUE_SIZES)
@pytest.mark.parametrize("kind", [Type.HALF, Type.BFLOAT16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("op", ["LayerNormRotate", "GegluRotate"])
def test_tokens_are_rotated_and_quantized_behind_a_prologue(machine, op, kind, channels, block):
    rng = np.random.default_rng(channels)
    normal = lambda *shape: rng.standard_normal(shape, np.float32).astype(TYPES[kind])  # noqa: E731
    signs, is_norm = rng.choice(np.float32([-1, 1]), channels).astype(TYPES[kind]), op == "LayerNormRotate"
    x = normal(2, 3, channels * (1 if is_norm else 2))
    rows = [normal(2, 1, channels) for _ in range(2 * is_norm)]
    epsilon = {"epsilon": 1e-6} if is_norm else {}
    factors = factorize(block)
    attributes = {"block": block, "base": factors.base, "order": factors.order, **epsilon}
    needed = OPS[op].reference(x, *rows, signs, **attributes)
    call = Call(PROLOGUES[op], x, signs, block, *(rows or (None, None)), **epsilon)
    y, _ = call.run(machine, kind)
    assert nmse(y, needed) <= TOLERANCE[kind]
    for got, codes in zip(call.run(machine, kind, 8), quantize_tokens(y, 8), strict=True):
        np.testing.assert_array_equal(got, codes)


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_are_rotated_and_quantized(machine, seed):
    rng = np.random.default_rng(seed)
    tokens, block = int(rng.choice([0, 1, 2, 5])), int(rng.choice([1, 2, 4, 8, 16, 64, 12, 20, 36]))
    channels = block * int(rng.integers(1, 30))
    x, signs = rng.standard_normal((tokens, channels), np.float32), rng.choice(np.float32([-1, 1]), channels)
    call = Call(Prologue.NONE, x, signs, block)
    y, _ = call.run(machine, Type.FLOAT)
    assert nmse(y, transform(x * signs, block)) <= TOLERANCE[Type.FLOAT], (tokens, channels, block)
    for got, needed in zip(call.run(machine, Type.FLOAT, 8), quantize_tokens(y, 8), strict=True):
        np.testing.assert_array_equal(got, needed)


@pytest.mark.parametrize(
    ("offset", "outer", "inner"), [(1, 36, 0), (0, 33, 0), (0, 100, 33)], ids=["row", "outer", "inner"]
)
@pytest.mark.parametrize("odd", ["scale", "shift"])
def test_rows_of_a_modulation_may_begin_anywhere(machine, odd, offset, outer, inner):
    """What begins between two vectors is for another kernel, with the same numbers."""
    rng = np.random.default_rng(3)
    x, values = rng.standard_normal((2, 3, 32), np.float32), rng.standard_normal(240, np.float32)
    source, tensor, target = machine.put(values), machine.put(x), machine.empty(x.shape, np.float32)
    odd_rows, even_rows = Modulation(source.address + 4 * offset, outer, inner), Modulation(source.address, 32, 0)
    scale, shift = (odd_rows, even_rows) if odd == "scale" else (even_rows, odd_rows)
    machine.kernels.rotate(
        Rotation(
            x=tensor.address, scale=scale, shift=shift, y=target.address, tokens=Tokens(2, 3), channels=32, block=1,
            prologue=Prologue.RMS_NORM, epsilon=1e-6,
        )
    )  # fmt: skip
    if machine.name == "emulated":
        assert machine.launched()[0] == KERNELS["shared"]
    unit = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-6))
    starts = offset + outer * np.arange(2)[:, None] + inner * np.arange(3)
    rows = {odd: values[starts[..., None] + np.arange(32)], "even": values[:64].reshape(2, 1, 32)}
    factor, term = (rows[odd], rows["even"]) if odd == "scale" else (rows["even"], rows[odd])
    assert nmse(machine.read(target), unit * factor + term) <= 1e-12


def test_no_token_is_no_work(machine):
    y, _ = Call(Prologue.NONE, np.zeros((0, 64), np.float32), None, 64).run(machine, Type.HALF)
    assert y.shape == (0, 64)


def test_a_block_that_shared_memory_cannot_hold_is_a_named_error(emulated):
    x = np.zeros((1, 32768), np.float32)
    with pytest.raises(KernelError, match="shared memory") as refused:
        Call(Prologue.NONE, x, None, 32768).run(emulated, Type.FLOAT)
    assert refused.value.status == Status.NOT_COMPILED
