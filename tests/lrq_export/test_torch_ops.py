"""torch.ops.lrq: what of it shows without kernels."""

import pytest
import torch

import lrq_export.torch_ops as torch_ops
from lrq_export.errors import MissingError, UsageError
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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingError, match="plugins build"):
        find_library()
