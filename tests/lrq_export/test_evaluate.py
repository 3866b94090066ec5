"""What a proof keeps of the weights that it evaluates."""

import numpy as np
import pytest
import torch

from graphs.expressions import Expression, RotateInput
from lrq_export.evaluate import KeptWeights, evaluate

PLAIN = [Expression(name, (4, 8)) for name in "abc"]
ROTATED = [each.then(RotateInput(block=8)) for each in PLAIN]
BYTES = 4 * 8 * 4  # of each, float32


@pytest.fixture
def reads():
    """A source that counts what is read of it."""

    def read(name):
        read.names.append(name)
        return torch.full((4, 8), float(ord(name))) + torch.arange(8.0)

    read.names = []
    return read


def ask(kept, expressions, read):
    return [kept.array(each, read) for each in expressions]


def test_what_is_asked_again_is_not_read_again(reads):
    kept = KeptWeights(3 * BYTES)
    first = ask(kept, ROTATED, reads)
    kept.forget_unasked()
    second = ask(kept, ROTATED, reads)
    assert reads.names == list("abc")
    for each, once, again in zip(ROTATED, first, second, strict=True):
        np.testing.assert_array_equal(once, evaluate(each, reads).numpy())
        np.testing.assert_array_equal(again, once)


def test_another_expression_of_the_same_source_is_another_weight(reads):
    kept = KeptWeights(6 * BYTES)
    assert not np.allclose(*ask(kept, [PLAIN[0], ROTATED[0]], reads))


def test_no_more_is_kept_than_the_limit(reads):
    kept = KeptWeights(2 * BYTES)
    for _ in range(3):
        ask(kept, PLAIN, reads)
        kept.forget_unasked()
    assert kept.held == 2 * BYTES
    assert reads.names == [*list("abc"), "c", "c"]


def test_what_nobody_asked_for_makes_room(reads):
    kept = KeptWeights(BYTES)
    for expressions in (PLAIN[:1], PLAIN[1:2], PLAIN[1:2], PLAIN[1:2]):
        ask(kept, expressions, reads)
        kept.forget_unasked()
    assert reads.names == list("abb")
    assert kept.held == BYTES
