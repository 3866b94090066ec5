import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.equalizer import divisors, encode

WANTED = st.lists(st.floats(2.0**-30, 2.0**30), min_size=1, max_size=40).map(np.array)


@given(WANTED)
def test_every_divisor_is_within_an_eighth_of_an_octave(wanted):
    got = divisors(encode(wanted))
    assert got.shape == wanted.shape
    assert np.abs(np.log2(got / wanted)).max() <= 1 / 8 + 1e-12


@given(WANTED)
def test_text_is_plain_and_encoding_again_changes_nothing(wanted):
    text = encode(wanted)
    assert json.loads(json.dumps(text)) == text
    assert encode(divisors(text)) == text


def test_what_is_too_far_is_bounded():
    assert divisors(encode(np.array([1e-30, 1e30]))).tolist() == [2**-31.75, 2**31.75]


@pytest.mark.parametrize("wanted", [[1.0, 0.0], [-1.0], [np.inf], [np.nan]])
def test_other_numbers_are_refused(wanted):
    with pytest.raises(ValueError, match="positive and finite"):
        encode(np.array(wanted))
