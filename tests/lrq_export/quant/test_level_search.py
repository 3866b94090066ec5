"""The tables say exactly what a candidate costs."""

import pytest
import torch

from lrq_export.quant.level_search import HALF_UNITS, Magnitudes, gains, gains_of_all, prefix_sums, search
from lrq_export.quant.level_sets import searched_sets


def direct_gain(weight, moment, scale, levels):
    """sum h x^2 - min over levels of sum h (x - m)^2, with x = |w| / scale, from the definition in float64."""
    x = weight.double().abs() / scale
    error = (x[:, None] - levels.double()).square().amin(1)
    return (moment.double() * (x.square() - error)).sum()


@pytest.mark.parametrize("clip", [3, 8, 16])
def test_a_gain_from_the_table_is_the_gain_by_definition(clip):
    torch.manual_seed(0)
    weight, moment = torch.randn(2, 200), torch.rand(1, 200)
    sets = searched_sets(3)
    ids = torch.randint(0, len(sets.levels), (25,))
    source = Magnitudes(weight, weight.abs().amax(1), moment)
    sums = prefix_sums(source, slice(0, 2), fine=16)
    found = gains(sums.decision_table(16, clip), sums.h[:, -1], sums.y[:, -1] * (16 / clip), sets, ids).view(2, 2, -1)
    for row in range(2):
        scale = source.units[row].item() * clip / 16 / (HALF_UNITS / 2)
        for sign, side in enumerate((weight[row] >= 0, weight[row] < 0)):
            for column, index in enumerate(ids):
                expected = direct_gain(weight[row, side], moment[0, side], scale, sets.levels[index])
                energy = direct_gain(weight[row, side], moment[0, side], scale, torch.tensor([0])) + 1e4
                assert abs(found[row, sign, column] - expected) < 1e-5 * energy + 1e-5 * abs(expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gains_of_all_sets_are_those_of_each_to_the_last_bit(bits):
    torch.manual_seed(0)
    table, h, y, sets = torch.randn(3, HALF_UNITS + 1), torch.rand(3), 100 * torch.rand(3), searched_sets(bits)
    assert torch.equal(gains_of_all(table, h, y, sets), gains(table, h, y, sets, torch.arange(len(sets.levels))))


def test_a_sign_without_weights_takes_the_all_zero_set():
    weight = torch.rand(3, 40) + 0.1
    source = Magnitudes(weight, weight.amax(1), torch.ones(1, 40))
    _, best = search(source, searched_sets(3), fine=16, clips=(8, 16), candidates=8)
    assert (best[:, 1] == 0).all()
    assert (best[:, 0] != 0).all()
