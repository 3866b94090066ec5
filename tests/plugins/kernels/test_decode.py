"""lrqDecode and lrqDequantize give the integers that the dialect's formats define, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from kernel_machine import NOTHING

from graphs.ops import codebook_dequant, packing, twin_log_dequant, words
from lrq_export.kernels import Format, Layout, Weight

F, I = 4, 6  # noqa: E741

# (rows, cols, group_size): one block of rows and a part of one, several runs a lane, groups, then widths and groups
# that no 16-code run fits, which another kernel takes.
SHAPES = [(9, 32, 32), (2, 1152, 1152), (3, 2560, 64), (8, 48, 16), (5, 13, 13), (3, 30, 10), (4, 40, 8), (1, 1, 1)]
HOSTILE = np.array([-128, -127, -1, 0, 1, 5, 64, 127], np.int8)


@dataclass
class Packed:
    """A weight in numpy: its codes and what gives them their meaning."""

    format: Format
    bits: int
    group_size: int
    codes: np.ndarray
    levels: np.ndarray

    @classmethod
    def random(cls, form: Format, bits: int, rows: int, cols: int, group_size: int, seed: int = 0) -> Packed:
        rng = np.random.default_rng(seed)
        draw = twin_log_dequant.random_exponents if form == Format.TWIN_LOG else codebook_dequant.random_table
        codes = rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
        return cls(form, bits, group_size, codes, draw(rng, rows, cols // group_size, bits))

    def raw(self, layout: Layout) -> np.ndarray:
        if layout == Layout.WORDS:
            return words.prepack(self.codes, self.bits)
        return np.frombuffer(packing.pack(self.codes, self.bits).raw, np.uint8)

    def table(self) -> np.ndarray:
        """The level of every code, int8 (rows, groups, 2^bits), clamped as the kernels clamp it."""
        if self.format == Format.TWIN_LOG:
            magnitude = np.clip(twin_log_dequant.levels(self.levels, self.bits, F, I), -127, 127)
            return np.concatenate([magnitude[:, :, 0], -magnitude[:, :, 1]], axis=-1).astype(np.int8)
        return np.maximum(self.levels, np.int8(-127))

    def decoded(self) -> np.ndarray:
        rows, cols = self.codes.shape
        grouped = self.codes.reshape(rows, -1, self.group_size).astype(np.int64)
        return np.take_along_axis(self.table(), grouped, axis=2).reshape(rows, cols)

    def place(self, machine, layout: Layout) -> tuple[Weight, list]:
        """The struct and the buffers it points into."""
        rows, cols = self.codes.shape
        kept = [machine.put(self.raw(layout)), machine.put(self.levels)]
        weight = Weight(
            kept[0].address, kept[1].address, rows, cols, self.group_size, self.format, layout, self.bits, F, I
        )
        return weight, kept

    def decode_on(self, machine, layout: Layout) -> np.ndarray:
        weight, _kept = self.place(machine, layout)
        decoded = machine.empty(self.codes.shape, np.int8)
        machine.kernels.decode(weight, decoded.address)
        return machine.read(decoded)


def every_form(test):
    for name, values in {"layout": Layout, "form": [Format.TWIN_LOG, Format.CODEBOOK]}.items():
        test = pytest.mark.parametrize(name, list(values), ids=lambda value: value.name)(test)
    return pytest.mark.parametrize("bits", [4, 3, 2])(test)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_form
def test_codes_become_the_integers_of_the_reference(machine, bits, form, layout, shape):
    packed = Packed.random(form, bits, *shape)
    np.testing.assert_array_equal(packed.decode_on(machine, layout), packed.decoded())


def test_the_expectation_is_the_reference():
    for form, module in ((Format.TWIN_LOG, twin_log_dequant), (Format.CODEBOOK, codebook_dequant)):
        packed = Packed.random(form, 3, 4, 64, 16)
        elements = packing.elements(packing.pack(packed.codes, 3))
        needed = module.integer_weight(elements, packed.levels, bits=3, group_size=16, cols=64)
        np.testing.assert_array_equal(packed.decoded(), needed)


@every_form
def test_one_perturbed_code_changes_one_weight(machine, bits, form, layout):
    packed = Packed.random(form, bits, 3, 64, 32)
    needed = packed.decoded()
    packed.codes[1, 37] ^= 1
    assert np.argwhere(packed.decode_on(machine, layout) != needed).tolist() == [[1, 37]]


@pytest.mark.parametrize("cols", [32, 31])
def test_levels_that_nobody_checked_stay_within_127(machine, cols):
    for form in (Format.TWIN_LOG, Format.CODEBOOK):
        packed = Packed.random(form, 4, 40, cols, cols)
        packed.levels = np.random.default_rng(5).choice(HOSTILE, packed.levels.shape)
        decoded = packed.decode_on(machine, Layout.WORDS)
        np.testing.assert_array_equal(decoded, packed.decoded())
        assert decoded.min() >= -127


@pytest.mark.parametrize("shape", [(9, 64, 32), (3, 13, 13)], ids=str)
@every_form
def test_dequantized_weights_are_scaled_integers(machine, bits, form, layout, shape):
    packed = Packed.random(form, bits, *shape)
    scale = np.random.default_rng(6).uniform(0.001, 0.01, shape[0]).astype(np.float32)
    weight, _kept = packed.place(machine, layout)
    source, target = machine.put(scale), machine.empty(shape[:2], np.float32)
    machine.kernels.dequantize(weight, source.address, target.address)
    np.testing.assert_array_equal(machine.read(target), scale[:, None] * packed.decoded().astype(np.float32))


def test_int8_weights_decode_to_themselves(machine):
    codes = np.random.default_rng(7).integers(-127, 128, (5, 13)).astype(np.int8)
    source, scale = machine.put(codes), machine.put(np.full(5, 0.5, np.float32))
    weight = Weight(source.address, NOTHING.address, 5, 13, 0, Format.INT8, Layout.STORAGE, 8, 0, 0)
    decoded, dequantized = machine.empty((5, 13), np.int8), machine.empty((5, 13), np.float32)
    machine.kernels.decode(weight, decoded.address)
    machine.kernels.dequantize(weight, scale.address, dequantized.address)
    np.testing.assert_array_equal(machine.read(decoded), codes)
    np.testing.assert_array_equal(machine.read(dequantized), codes * np.float32(0.5))
