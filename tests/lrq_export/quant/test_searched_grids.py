"""Quantizers that search find the best of what their definition lists, by plain loops over rows and candidates."""

import math

import numpy as np
import pytest
import torch

from lrq_export.quant import codebook, twin_log
from lrq_export.quant.codebook_weight import weighted_error
from lrq_export.quant.methods import METHODS

ROWS, COLS = 6, 120
QUANTILES = (0.9, 0.95, 0.98, 0.99, 0.999, 0.9999, 1.0)
OFFSETS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


def octaves(magnitudes, bits, per_octave, h):
    """log2 and log √2: least error of one sign of one row."""
    count, errors = 2 ** (bits - 1), []
    for quantile in QUANTILES:
        top = np.quantile(magnitudes, quantile)
        q = np.clip(np.round(-per_octave * np.log2(magnitudes / top)), 0, count - 1)
        errors.append(h @ (top * 2.0 ** (-q / per_octave) - magnitudes) ** 2)
    return min(errors)


def twin_log_text(magnitudes, bits, h):
    """LRQ-DiT (4)-(10), the clip of one sign searched."""
    count, logs, errors = 2 ** (bits - 1), np.log2(magnitudes), []
    for clip in np.arange(6, 21) / 20:
        low, high = logs.min(), max(logs.min(), logs.max() + math.log2(clip))
        step = max((high - low) / (count - 1), 1e-6)
        zero = np.round(low / step)
        exponent = step * (np.clip(np.round(logs / step) - zero, 0, count - 1) + zero)
        whole = np.floor(exponent)
        errors.append(h @ (np.round(2 ** (exponent - whole + 6)) * 2 ** (whole - 6) - magnitudes) ** 2)
    return min(errors)


def steps_of_a_side(magnitudes, bits, h):
    """Twin uniform: the clip of one sign searched."""
    count, errors = 2 ** (bits - 1), []
    for clip in np.arange(8, 41) / 40:
        step = magnitudes.max() * clip / (count - 1)
        errors.append(h @ (np.clip(np.round(magnitudes / step), 0, count - 1) * step - magnitudes) ** 2)
    return min(errors)


def by_sides(of_a_side):
    def error(weight, bits, h):
        return sum(
            of_a_side(np.abs(row[side]), bits, h[side]) for row in weight for side in (row > 0, row < 0) if side.any()
        )

    return error


def clipped_ranges(weight, bits, h):
    total, top = 0.0, 2**bits - 1
    for row in weight:
        errors = []
        for clip in np.arange(20, 101, 2) / 100:
            low, high = row.min() * clip, row.max() * clip
            step = (high - low) / top
            errors.append(h @ (low + np.clip(np.round((row - low) / step), 0, top) * step - row) ** 2)
        total += min(errors)
    return total


def shifted_logarithms(weight, bits, h):
    """I&S-ViT: one offset for the tensor, every (row, sign) uniform over all of its range."""
    count, errors = 2 ** (bits - 1), []
    for offset in OFFSETS:
        total = 0.0
        for row in weight:
            for side in (row > 0, row < 0):
                magnitudes = np.abs(row[side])
                logs = np.log2(magnitudes + offset)
                step = (logs.max() - logs.min()) / (count - 1)
                zero = np.round(logs.min() / step)
                q = np.clip(np.round(logs / step) - zero, 0, count - 1)
                total += h[side] @ (2 ** (step * (q + zero)) - offset - magnitudes) ** 2
        errors.append(total)
    return min(errors)


DEFINITIONS = {
    "log2": by_sides(lambda magnitudes, bits, h: octaves(magnitudes, bits, 1, h)),
    "log_sqrt2": by_sides(lambda magnitudes, bits, h: octaves(magnitudes, bits, 2, h)),
    "tlq_paper": by_sides(twin_log_text),
    "twin_uniform": by_sides(steps_of_a_side),
    "uniform_clip": clipped_ranges,
    "shift_uniform_log2": shifted_logarithms,
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.03, 1.0, 6.0])
def test_the_error_is_that_of_the_definition(name, bits, scale):
    """Positive and negative weights differ, columns count differently: each sign, and the weighting, matter."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(ROWS, COLS, generator=generator)
    weight = scale * torch.where(weight > 0, weight, 0.3 * weight.sign() * weight.abs() ** 2)
    importance = 10 ** torch.rand(COLS, generator=generator, dtype=torch.float64).mul(3)
    importance /= importance.mean()
    quantized = METHODS[name].quantize(weight, importance, bits=bits)
    got = float(weighted_error(weight, quantized.dequantize(), importance).sum())
    wanted = DEFINITIONS[name](weight.double().numpy(), bits, importance.numpy())
    assert got == pytest.approx(wanted, rel=2e-3)


def test_groups_of_a_codebook_are_fitted_each_by_its_own_columns():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 96, generator=generator)
    importance = torch.rand(96, generator=generator).pow(6) + 1e-3
    grouped = METHODS["codebook"].quantize(weight, importance, bits=3, group_size=32).dequantize()
    apart = torch.cat(
        [
            METHODS["codebook"].quantize(part, h, bits=3).dequantize()
            for part, h in zip(weight.split(32, 1), importance.split(32), strict=True)
        ],
        dim=1,
    )
    got, wanted = (float(weighted_error(weight, each, importance).sum()) for each in (grouped, apart))
    assert got <= 1.02 * wanted  # tables are rounded to the largest value of the row, not the group


def test_values_of_a_codebook_are_weighted_means_of_what_is_rounded_to_them():
    """Lloyd's condition, up to the rounding of the table to 127ths of the row's largest value."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 400, generator=generator)
    importance = torch.rand(400, generator=generator).pow(4) + 1e-3
    held = codebook.quantize(weight, importance, bits=3)
    off = []
    for row, codes, values, scale in zip(weight, held.codes, held.codebooks()[:, 0], held.scale, strict=True):
        for code in codes.unique().tolist():
            members = codes == code
            mean = (importance * row)[members].sum() / importance[members].sum()
            off.append(float((mean - values[code]).abs() / scale))
    assert np.mean(off) < 0.5
    assert max(off) < 3


# Bits beside the codes of a row, at 4 bits and one group; and at 3.
SIDE_DATA = {
    "tlq": (32 + 48, 32 + 48), "codebook": (32 + 128, 32 + 64), "tlq_paper": (64, 64), "tlq_released": (64, 64),
    "tlq_released_as_is": (64, 64), "uniform_minmax": (32, 32), "uniform_clip": (32, 32), "twin_uniform": (32, 32),
    "log2": (32, 32), "log_sqrt2": (32, 32), "shift_uniform_log2": (64, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_side_data_of_a_row_is_counted(name):
    for bits, wanted in zip((4, 3), SIDE_DATA[name], strict=True):
        assert (METHODS[name].bits_per_weight(bits, 240) - bits) * 240 == pytest.approx(wanted)


def test_side_data_of_our_formats_is_what_packages_hold():
    """A float32 scale a row; a group's exponents are 2 x 3 bytes, its table 2^b."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for name, module, role in (("tlq", twin_log, "exponents"), ("codebook", codebook, "table")):
        held = module.quantize(weight, bits=3, group_size=16)
        stored = 8 * (held.scale.nbytes + getattr(held, role).nbytes) / len(weight)
        assert (METHODS[name].bits_per_weight(3, 64, 4) - 3) * 64 == pytest.approx(stored)
