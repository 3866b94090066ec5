"""torch.ops.lrq: what of it shows without kernels."""

import numpy as np
import pytest
import torch

import lrq_export.torch_ops as torch_ops
from graphs.ops import packing, words
from lrq_export.errors import MissingError, UsageError
from lrq_export.kernel_operands import code_bytes
from lrq_export.kernels import ENVIRONMENT, Format, Layout, Tokens, find_library, split_tokens
from lrq_export.torch_ops import WeightForm

FORM = WeightForm(24, 64, 64, Format.TWIN_LOG, Layout.WORDS, 4).values()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_types_are_known_without_a_gpu(dtype):
    ops, x = torch.ops.lrq, meta(2, 5, 64, dtype=dtype)
    codes, levels, scale = (
        meta(24, 32, dtype=torch.int8),
        meta(24, 1, 2, 3, dtype=torch.int8),
        meta(24, dtype=torch.float32),
    )
    rotated = ops.rotate(x, None, 64)
    assert (rotated.shape, rotated.dtype) == (x.shape, dtype)
    assert ops.rotate(x, None, 32, 6).shape == (2, 5, 32)  # GEGLU takes half of the channels
    quantized, scales = ops.rotate_quantize(x, None, 64, 8)
    assert (quantized.shape, quantized.dtype) == (x.shape, torch.int8)
    assert (scales.shape, scales.dtype) == ((2, 5, 1), torch.float32)
    assert ops.decode(codes, levels, FORM).shape == (24, 64)
    assert ops.dequantize(codes, levels, scale, FORM).dtype == torch.float32
    y = ops.linear(x, codes, levels, scale, None, FORM, 8)
    assert (y.shape, y.dtype) == ((2, 5, 24), dtype)
    again = ops.linear_quantized(quantized, scales, codes, levels, scale, None, FORM, 8, dtype)
    assert (again.shape, again.dtype) == ((2, 5, 24), dtype)


def operands(**changes):
    """Of a linear layer of 24 x 64 for 3 tokens; the ops get them only after they are checked."""
    given = {
        "x": torch.zeros(3, 64), "codes": torch.zeros(24, 32, dtype=torch.int8),
        "levels": torch.zeros(24, 1, 2, 3, dtype=torch.int8), "scale": torch.zeros(24), "bias": torch.zeros(24),
        "form": FORM, "act_bits": 8, "gate": torch.zeros(24), "residual": torch.zeros(3, 24),
        "decoded": torch.zeros(24, 64, dtype=torch.int8), "signs": torch.ones(64), "block": 64,
    }  # fmt: skip
    return given | changes


WRONG = {
    "channels": ({"x": torch.zeros(3, 32)}, r"x: got shape \(3, 32\), needed 64 channels on the last axis"),
    "codes of other rows": (
        {"codes": torch.zeros(8, 32, dtype=torch.int8)}, "codes: got 256 bytes, needed 768 for 24 x 64"),
    "no levels": ({"levels": None}, "levels: got none"),
    "levels of a table": (
        {"levels": torch.zeros(24, 1, 16, dtype=torch.int8)}, r"levels: got shape .* \(24, 1, 2, 3\)"),
    "a scale for each channel": ({"scale": torch.zeros(64)}, r"scale: got shape \(64,\), needed \(24,\)"),
    "a bias of another type": ({"bias": torch.zeros(24, dtype=torch.bfloat16)}, "bias: got torch.bfloat16"),
    "a residual of fewer tokens": (
        {"residual": torch.zeros(2, 24)}, r"residual: got shape \(2, 24\), needed \(3, 24\)"),
    "a gate of other channels": ({"gate": torch.zeros(3, 12)}, "gate: got shape"),
    "decoded to floats": ({"decoded": torch.zeros(24, 64)}, "decoded: got torch.float32, needed torch.int8"),
    "signs of another type": ({"signs": torch.ones(64, dtype=torch.float16)}, "signs: got torch.float16"),
    "fewer signs": ({"signs": torch.ones(32)}, r"signs: got shape \(32,\)"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_the_kernels_would_read_past_is_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        torch_ops.linear._init_fn(**operands(**changes))


def test_what_fits_is_passed_on(monkeypatch):
    """The twin: nothing is refused but what is wrong."""
    calls = []
    monkeypatch.setattr(torch_ops, "_run_linear", lambda call, y: calls.append(y.shape))
    torch_ops.linear._init_fn(**operands())
    assert calls == [(3, 24)]


FORMS = [
    (4, Layout.WORDS),
    (3, Layout.WORDS),
    (2, Layout.WORDS),
    (4, Layout.STORAGE),
    (3, Layout.STORAGE),
    (2, Layout.STORAGE),
]


@pytest.mark.parametrize(("bits", "layout"), FORMS, ids=str)
def test_codes_have_the_bytes_of_their_layout(bits, layout):
    codes = np.zeros((5, 40), np.uint8)
    stored = words.prepack(codes, bits).nbytes if layout == Layout.WORDS else len(packing.pack(codes, bits).raw)
    assert code_bytes(5, 40, Format.TWIN_LOG, layout, bits) == stored


def test_half_of_a_norm_is_refused():
    with pytest.raises(UsageError, match="scale and shift"):
        torch_ops._run_rotation(torch.zeros(1, 8), None, 8, 1, torch.zeros(8), None, 0.0, None, None, 0)


# lead, shapes of modulations, (outer, inner), strides
SPLITS = [
    ((2, 3), [(8,)], (1, 6), [(0, 0)]),
    ((2, 3), [(2, 1, 8)], (2, 3), [(8, 0)]),
    ((2, 3), [(3, 8), (1, 1, 8)], (2, 3), [(0, 8), (0, 0)]),
    ((2, 3), [(2, 3, 8), (8,)], (1, 6), [(0, 8), (0, 0)]),
    ((2, 3), [(2, 3, 8), (2, 1, 8)], (2, 3), [(24, 8), (8, 0)]),
    ((4,), [(8,), (4, 8)], (1, 4), [(0, 0), (0, 8)]),
    ((), [(8,)], (1, 1), [(0, 0)]),
    ((2, 3, 5), [(2, 3, 1, 8)], (6, 5), [(8, 0)]),
    ((2, 3, 5), [(2, 1, 5, 8)], None, None),
]


@pytest.mark.parametrize(("lead", "shapes", "counts", "strides"), SPLITS, ids=str)
def test_modulations_are_rows_of_outer_and_inner_tokens(lead, shapes, counts, strides):
    found = split_tokens(lead, shapes)
    if counts is None:
        assert found is None
        return
    tokens, got = found
    assert ((tokens.outer_count, tokens.inner_count), got) == (counts, strides)
    assert isinstance(tokens, Tokens)
    for shape, (outer, inner) in zip(shapes, got, strict=True):
        source = torch.arange(torch.Size(shape).numel()).reshape(shape)
        view = source.as_strided((*counts, shape[-1]), (outer, inner, 1)).reshape(*lead, shape[-1])
        assert torch.equal(view, source.expand(*lead, shape[-1]))


def test_a_library_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "absent.so"))
    with pytest.raises(MissingError, match=r"absent\.so: there is no such library"):
        find_library()
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.delenv("LRQ_PLUGINS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingError, match="plugins build"):
        find_library()


def test_a_library_lies_where_it_is_named_or_beside_the_plugins(monkeypatch, tmp_path):
    for name in ("liblrq_plugins.so", "liblrq_kernels.so"):
        (tmp_path / name).touch()
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("LRQ_PLUGINS", str(tmp_path))
    assert find_library() == tmp_path / "liblrq_kernels.so"
    assert find_library(tmp_path / "liblrq_plugins.so") == tmp_path / "liblrq_plugins.so"
