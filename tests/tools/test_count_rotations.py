"""Online rotations at the widths of a real model: few, fused, and cheap."""

from dataclasses import replace
from pathlib import Path

import count_rotations
import pytest

GRAPH = Path(__file__).parents[2] / "docs/graph.md"


@pytest.fixture(scope="module")
def counted():
    """DiT-XL/2, the quickest of them to trace."""
    return {"DiT-XL/2": count_rotations.count("DiT-XL/2", prove=False)}


def test_half_of_the_rotations_are_gone_and_the_rest_is_fused(counted):
    for before, left in counted["DiT-XL/2"].values():
        assert (before.rotations, left.rotations, left.fused) == (6, 3, 3)


def test_what_is_left_costs_little(counted):
    assert count_rotations.dear_blocks(counted) == []
    assert all(0.001 < left.share <= 0.02 for _, left in counted["DiT-XL/2"].values())


def test_the_document_has_the_counts(counted):
    """The other families take a minute to trace; CI runs the tool for all."""
    assert count_rotations.not_in(GRAPH.read_text(), count_rotations.table(counted)) == []


def test_a_count_that_the_document_has_not_is_named(counted):
    """The twin."""
    wrong = {
        "DiT-XL/2": {block: (before, replace(left, fused=2)) for block, (before, left) in counted["DiT-XL/2"].items()}
    }
    assert len(count_rotations.not_in(GRAPH.read_text(), count_rotations.table(wrong))) == 1


def test_a_dear_block_would_be_named(counted):
    """The twin of the test above."""
    blocks = counted["DiT-XL/2"]
    spoilt = {
        block: (before, replace(left, rotation_work=10 * left.rotation_work))
        for block, (before, left) in blocks.items()
    }
    assert count_rotations.dear_blocks({"DiT-XL/2": spoilt}) == [f"DiT-XL/2 {block}" for block in blocks]
