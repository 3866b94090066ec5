"""Per-token activation quantization."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lrq_export.errors import UsageError
from lrq_export.quant.activation import quantize_tokens

FINITE = st.floats(-1e4, 1e4, width=32)


@given(arrays(np.float32, (3, 7), elements=FINITE), st.sampled_from([6, 8]))
@settings(deadline=None)
def test_equals_numpy(x, bits):
    top = 2 ** (bits - 1) - 1
    s = (np.abs(x).max(-1, keepdims=True) / np.float32(top)).astype(np.float32)
    s[s == 0] = 1
    q, scale = quantize_tokens(torch.from_numpy(x), bits)
    np.testing.assert_array_equal(scale.numpy(), s)
    np.testing.assert_array_equal(q.numpy(), np.clip(np.rint(x / s), -top, top))
    normal = s[:, 0] >= np.finfo(np.float32).tiny  # below, a step itself is off by up to a half
    assert (np.abs(q.numpy() * s - x) <= 0.5001 * s)[normal].all()


def test_halves_round_to_even_and_the_largest_reaches_the_top():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float16)
    q, s = quantize_tokens(x, 8)
    assert q.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert s.tolist() == [[1], [1]]
    assert q.dtype == s.dtype == torch.float32


def test_other_widths_are_refused():
    with pytest.raises(UsageError, match="2 to 8"):
        quantize_tokens(torch.ones(1, 2), 16)
