"""Sizes of TensorRT engines: what a recipe writes, what it leaves to the recorded inputs, and what does not fit."""

import pytest
import torch

from lrq_export.engine.profiles import Range, parse_profile, recorded_sizes, shapes_of
from lrq_export.errors import UsageError
from lrq_export.models.base import InputSpec

SPECS = {
    "hidden_states": InputSpec(("samples", 4, "height", "width"), multiple_of=2, at_most=64),
    "encoder_hidden_states": InputSpec(("samples", "text", 16)),
    "timestep": InputSpec(("samples",)),
}
INPUTS = {
    "hidden_states": torch.zeros(5, 4, 8, 12),
    "encoder_hidden_states": torch.zeros(5, 6, 16),
    "timestep": torch.zeros(5),
}
RECORDED = {"samples": 1, "height": 8, "width": 12, "text": 6}


def test_sizes_are_those_of_one_recorded_sample():
    assert recorded_sizes(SPECS, INPUTS) == RECORDED


def test_without_a_word_samples_alone_are_free():
    ranges = parse_profile("", RECORDED, SPECS)
    assert ranges == {"samples": (1, 1, 4), "height": (8,) * 3, "width": (12,) * 3, "text": (6,) * 3}


def test_every_input_gets_least_usual_and_largest_shape():
    shapes = shapes_of(parse_profile("samples=1:2:8 height=4:8:64 text=77", RECORDED, SPECS), SPECS)
    assert shapes == {
        "hidden_states": [(1, 4, 4, 12), (2, 4, 8, 12), (8, 4, 64, 12)],
        "encoder_hidden_states": [(1, 77, 16), (2, 77, 16), (8, 77, 16)],
        "timestep": [(1,), (2,), (8,)],
    }


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("depth=3", "needed an axis of this model: samples, height, width, text"),
        ("height", "needed AXIS=SIZE or AXIS=LEAST:USUAL:LARGEST"),
        ("height=4:8", "needed AXIS=SIZE or AXIS=LEAST:USUAL:LARGEST"),
        ("height=-4", "needed AXIS=SIZE or AXIS=LEAST:USUAL:LARGEST"),
        ("height=8:4:16", "in ascending order"),
        ("samples=0:1:2", "needed sizes from 1 to 2147483647"),
        ("samples=1:2:2147483648", "needed sizes from 1 to 2147483647"),
        ("samples=1 text=2 samples=4", "got samples twice"),
        ("height=7", "height is 7, needed a multiple of 2"),
        ("height=4:8:66", "height is 66, needed at most 64"),
    ],
)
def test_what_does_not_fit_is_refused(text, needed):
    with pytest.raises(UsageError, match=r"^engine\.profiles: ") as refused:
        parse_profile(text, RECORDED, SPECS)
    assert needed in str(refused.value)


def test_ranges_are_plain_numbers():
    assert Range(1, 2, 3)._asdict() == {"least": 1, "usual": 2, "most": 3}
