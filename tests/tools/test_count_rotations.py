"""Online rotations at the widths of a real model: few, fused, and cheap."""

from dataclasses import replace

import count_rotations
import pytest


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


def test_a_dear_block_would_be_named(counted):
    """The twin of the test above."""
    blocks = counted["DiT-XL/2"]
    spoilt = {
        block: (before, replace(left, rotation_work=10 * left.rotation_work))
        for block, (before, left) in blocks.items()
    }
    assert count_rotations.dear_blocks({"DiT-XL/2": spoilt}) == [f"DiT-XL/2 {block}" for block in blocks]
