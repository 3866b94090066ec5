"""plugins/core, compiled with g++ on every run, computes what the numpy references say, bit for bit."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from graphs.ops import packing
from graphs.ops.token_product import quantize_tokens, token_product
from graphs.ops.twin_log_dequant import integer_weight, levels, random_exponents, table

SOURCE = Path(__file__).parents[2] / "plugins" / "core" / "c_api.cpp"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
OK, NULL_POINTER, BAD_BITS, BAD_SIZE, BAD_GROUP, BAD_EXPONENTS = range(6)
SHAPES = [(6, 24, 24), (5, 32, 8), (3, 13, 13), (2, 3, 3)]  # rows, cols, group_size

i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class PackedWeight(ctypes.Structure):
    _fields_ = (
        ("codes", pointer), ("codes_bytes", i64), ("exponents", pointer), ("exponents_bytes", i64),
        ("rows", i64), ("cols", i64), ("group_size", i64),
        ("bits", i32), ("fraction_bits", i32), ("integer_bits", i32),
    )  # fmt: skip


class Product(ctypes.Structure):
    _fields_ = (
        ("activations", pointer), ("token_scales", pointer), ("weight", pointer), ("row_scales", pointer),
        ("bias", pointer), ("tokens", i64), ("rows", i64), ("cols", i64),
    )  # fmt: skip


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """The library; undefined behaviour in it is printed on stderr, where `no_undefined_behaviour` sees it."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler: install g++")
    library = tmp_path_factory.mktemp("core") / "liblrq_core.so"
    command = ["g++", *FLAGS, str(SOURCE), "-o", str(library)]
    if subprocess.run([*command, "-fsanitize=undefined"], capture_output=True).returncode != 0:
        subprocess.run(command, check=True)  # no libubsan on this machine; warnings are still errors
    loaded = ctypes.CDLL(str(library))
    loaded.lrqStatusText.restype = ctypes.c_char_p
    loaded.lrqQuantizeTokens.argtypes = [pointer, i64, i64, i32, pointer, pointer]
    return loaded


@pytest.fixture(autouse=True)
def no_undefined_behaviour(capfd):
    yield
    assert "runtime error" not in capfd.readouterr().err


def at(array):
    return array.ctypes.data


class Weight:
    """A packed weight in numpy and, by `struct`, in C."""

    def __init__(self, bits, rows, cols, group_size, seed=0):
        rng = np.random.default_rng(seed)
        self.bits, self.rows, self.cols, self.group_size = bits, rows, cols, group_size
        self.codes = rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
        self.exponents = random_exponents(rng, rows, cols // group_size, bits)
        self.raw = np.frombuffer(packing.pack(self.codes, bits).raw, np.uint8).copy()

    def struct(self, **changes):
        fields = {
            "codes": at(self.raw), "codes_bytes": self.raw.nbytes,
            "exponents": at(self.exponents), "exponents_bytes": self.exponents.nbytes,
            "rows": self.rows, "cols": self.cols, "group_size": self.group_size,
            "bits": self.bits, "fraction_bits": 4, "integer_bits": 6,
        }  # fmt: skip
        return ctypes.byref(PackedWeight(**fields | changes))

    def decoded(self):
        elements = packing.elements(packing.pack(self.codes, self.bits))
        return integer_weight(elements, self.exponents, bits=self.bits, group_size=self.group_size, cols=self.cols)

    def empty(self, dtype=np.int8):
        return np.empty((self.rows, self.cols), dtype)


@pytest.fixture(params=[(bits, *shape) for bits in (2, 3, 4) for shape in SHAPES], ids=str)
def weight(request):
    return Weight(*request.param)


def test_codes_are_unpacked(core, weight):
    codes = weight.empty(np.uint8)
    assert core.lrqUnpackCodes(weight.struct(), pointer(at(codes))) == OK
    np.testing.assert_array_equal(codes, weight.codes)


def test_shifts_and_tables_both_decode_to_the_reference(core, weight):
    for decode in (core.lrqDecodeByShifts, core.lrqDecodeByTable):
        decoded = weight.empty()
        assert decode(weight.struct(), pointer(at(decoded))) == OK
        np.testing.assert_array_equal(decoded, weight.decoded())


def test_one_perturbed_code_is_seen(core, weight):
    expected = weight.decoded()
    weight.raw[0] ^= 1
    decoded = weight.empty()
    assert core.lrqDecodeByShifts(weight.struct(), pointer(at(decoded))) == OK
    assert np.argwhere(decoded != expected).tolist() == [[0, 0]]


def test_tables_are_the_reference_tables(core, weight):
    tables = np.empty((*weight.exponents.shape[:2], 1 << weight.bits), np.int8)
    assert core.lrqExpandTables(weight.struct(), pointer(at(tables))) == OK
    np.testing.assert_array_equal(tables, table(weight.exponents, weight.bits, 4, 6))


@pytest.mark.parametrize(("fraction_bits", "integer_bits"), [(0, 0), (1, 8), (4, 6), (7, 0), (7, 8)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hostile_exponents_are_refused_exactly_where_the_reference_refuses_them(
    core, bits, fraction_bits, integer_bits
):
    rng = np.random.default_rng(bits)
    every = rng.integers(-128, 128, (400, 1, 2, 3)).astype(np.int8)
    every[::2, ..., 1] %= 16  # half of them climb slowly enough to have a chance
    every[::2, ..., 0] %= 64
    magnitude = levels(every, bits, fraction_bits, integer_bits)
    valid = ((magnitude >= 0) & (magnitude <= 127)).all((1, 2, 3)) & (every[..., 1] >= 0).all((1, 2))
    one = Weight(bits, 1, 1 << bits, 1 << bits)
    expected = table(every, bits, fraction_bits, integer_bits)[:, 0]
    decoded = np.empty(1 << bits, np.int8)
    for exponents, is_valid, values in zip(every, valid, expected, strict=True):
        one.exponents = exponents
        struct = one.struct(fraction_bits=fraction_bits, integer_bits=integer_bits)
        assert core.lrqExpandTables(struct, pointer(at(decoded))) == (OK if is_valid else BAD_EXPONENTS)
        if is_valid:
            np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"codes": None}, NULL_POINTER),
        ({"exponents": None}, NULL_POINTER),
        ({"bits": 5}, BAD_BITS),
        ({"bits": -1}, BAD_BITS),
        ({"bits": 2}, BAD_SIZE),
        ({"fraction_bits": 8}, BAD_BITS),
        ({"fraction_bits": -(2**31)}, BAD_BITS),
        ({"integer_bits": 2**31 - 1}, BAD_BITS),
        ({"rows": 0}, BAD_SIZE),
        ({"rows": -(2**63)}, BAD_SIZE),
        ({"cols": 2**63 - 1}, BAD_SIZE),
        ({"codes_bytes": 35}, BAD_SIZE),
        ({"exponents_bytes": 0}, BAD_SIZE),
        ({"group_size": 0}, BAD_GROUP),
        ({"group_size": -24}, BAD_GROUP),
        ({"group_size": 7}, BAD_GROUP),
        ({"group_size": 12}, BAD_SIZE),
    ],
    ids=str,
)
def test_hostile_fields_are_refused_and_nothing_is_written(core, changes, status):
    weight = Weight(3, 4, 24, 24)
    out = np.full((4, 24), 99, np.int8)
    for function in (core.lrqDecodeByShifts, core.lrqDecodeByTable, core.lrqExpandTables):
        assert function(weight.struct(**changes), pointer(at(out))) == status
        assert function(weight.struct(), None) == NULL_POINTER
        assert function(None, pointer(at(out))) == NULL_POINTER
    assert (out == 99).all()


@pytest.mark.parametrize("act_bits", [8, 6, 4])
def test_tokens_are_quantized_as_the_reference_does(core, act_bits):
    x = (np.random.default_rng(0).standard_normal((7, 33)) * np.logspace(-44, 30, 7)[:, None]).astype(np.float32)
    x[3] = 0
    codes, scales = np.empty(x.shape, np.int8), np.empty((7, 1), np.float32)
    assert core.lrqQuantizeTokens(at(x), 7, 33, act_bits, at(codes), at(scales)) == OK
    expected, expected_scales = quantize_tokens(x, act_bits)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(scales, expected_scales)


def test_tokens_that_are_not_finite_or_formats_that_do_not_exist_are_defined(core):
    x = np.array([[np.nan, 1, np.inf, -np.inf], [np.nan] * 4], np.float32)
    codes, scales = np.empty(x.shape, np.int8), np.empty((2, 1), np.float32)
    assert core.lrqQuantizeTokens(at(x), 2, 4, 8, at(codes), at(scales)) == OK
    assert np.abs(codes.astype(int)).max() <= 127
    assert core.lrqQuantizeTokens(at(x), 2, 4, 7, at(codes), at(scales)) == BAD_BITS
    assert core.lrqQuantizeTokens(at(x), 2, -4, 8, at(codes), at(scales)) == BAD_SIZE
    assert core.lrqQuantizeTokens(None, 2, 4, 8, at(codes), at(scales)) == NULL_POINTER


class Linear:
    """Inputs of one token product, in numpy and in C."""

    def __init__(self, tokens=5, rows=6, cols=33):
        rng = np.random.default_rng(0)
        self.sizes = {"tokens": tokens, "rows": rows, "cols": cols}
        self.x = rng.standard_normal((tokens, cols), np.float32)
        self.q, self.token_scales = quantize_tokens(self.x, 8)
        self.w = rng.integers(-127, 128, (rows, cols)).astype(np.int8)
        self.scale = rng.uniform(0.001, 0.01, rows).astype(np.float32)
        self.bias = rng.standard_normal(rows, np.float32)

    def run(self, core, **changes):
        y = np.full((self.sizes["tokens"], self.sizes["rows"]), np.nan, np.float32)
        arrays = {
            "activations": self.q, "token_scales": self.token_scales, "weight": self.w,
            "row_scales": self.scale, "bias": self.bias,
        }  # fmt: skip
        fields = {name: at(array) for name, array in arrays.items()} | self.sizes | changes
        return core.lrqTokenProduct(ctypes.byref(Product(**fields)), pointer(at(y))), y


def test_the_product_is_the_reference_product(core):
    linear = Linear()
    status, y = linear.run(core)
    expected = token_product(linear.x, linear.w, linear.scale, linear.bias, act_bits=8)
    assert status == OK
    np.testing.assert_array_equal(y, expected)
    linear.w[2, 0] ^= 1
    _, perturbed = linear.run(core)
    assert np.unique(np.argwhere(perturbed != expected)[:, 1]).tolist() == [2]


def test_a_product_whose_sum_could_overflow_is_refused(core):
    linear = Linear(tokens=1, rows=1, cols=131071)
    linear.q[:] = linear.w[:] = -128
    status, y = linear.run(core)
    assert (status, np.isfinite(y).all()) == (OK, True)
    assert linear.run(core, cols=131072)[0] == BAD_SIZE
    assert linear.run(core, bias=None)[0] == NULL_POINTER


def test_every_status_has_a_text(core):
    texts = [core.lrqStatusText(status) for status in (*range(6), 77)]
    assert len(set(texts)) == 7
    assert texts[0] == b"ok"
    assert texts[-1] == b"unknown status"
