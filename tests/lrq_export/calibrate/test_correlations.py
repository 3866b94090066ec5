"""E[x xᵀ] is streamed, saved and read back; a model too large for it is told so."""

import torch

from lrq_export.calibrate.correlations import Correlations, read_correlation, required_bytes
from lrq_export.plan import LayerPlan


def test_parts_give_the_mean_over_all_tokens(tmp_path):
    x = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    correlations = Correlations()
    for part in x:
        correlations.observe("layer", part)
    correlations.save(tmp_path / "c.safetensors")
    rows = x.reshape(-1, 6)
    torch.testing.assert_close(read_correlation(tmp_path / "c.safetensors", "layer"), rows.T @ rows / len(rows))


def test_none_were_collected_when_there_is_no_file(tmp_path):
    assert read_correlation(tmp_path / "c.safetensors", "layer") is None


def test_memory_is_that_of_one_square_a_layer():
    plans = [LayerPlan("a", 8, 100, 4, 100, 8, 0, None, ""), LayerPlan("b", 8, 10, 4, 10, 8, 0, None, "")]
    assert required_bytes(plans) == 4 * (100**2 + 10**2)
