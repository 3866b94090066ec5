"""The stored form of weights: what is written reads back, and every consumer decodes the same integers."""

import json
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.expressions import RotateOutput
from lrq_export.bind import quantize_layer
from lrq_export.checkpoint import TensorFile
from lrq_export.errors import InputError
from lrq_export.package import save_tensors_atomic
from lrq_export.quantized import FOLDED, ONLINE, LayerRecord, QuantizedFile, write_quantized
from lrq_export.saved_graphs import rewritten_graph


def record(rows, cols, bits, group_size=0, **changes):
    facts = {
        "layer": "net.0", "rows": rows, "cols": cols, "bits": bits, "group_size": group_size or cols, "act_bits": 8,
        "block": 0, "signs_seed": None, "rotated_by": "nothing", "reason": "a test",
    }  # fmt: skip
    return LayerRecord(**facts | changes)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), method=st.sampled_from(["tlq", "codebook"]),
    rows=st.integers(1, 5), groups=st.integers(1, 3), size=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_layer_reads_back_and_decodes_to_what_was_quantized(tmp_path_factory, bits, method, rows, groups, size, seed):
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed))
    layer = quantize_layer(weight, None, record(rows, groups * size, bits, 0 if bits == 8 else size, method=method))
    path = tmp_path_factory.mktemp("q") / "quantized.safetensors"
    write_quantized(path, [layer], {"net.0.bias": torch.ones(rows)})
    file = QuantizedFile(path)
    read = file.layer("net.0")
    assert read.record == layer.record
    assert torch.equal(read.codes, layer.codes)
    assert torch.equal(read.integer_weight(), layer.integer_weight())
    assert file.float_names() == ["net.0.bias"]
    integers = read.integer_weight()
    assert integers.dtype == torch.int8
    assert integers.shape == weight.shape
    assert int(integers.abs().max()) <= 127
    error = (integers * read.scale[:, None] - weight).double().square().sum() / weight.double().square().sum()
    assert read.record.weight_nmse == pytest.approx(float(error), rel=1e-6, abs=1e-12)


def test_columns_that_matter_more_are_quantized_better():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(32)
    importance[:4] = 1000.0
    plain, weighted = (quantize_layer(weight, moment, record(16, 32, 3)) for moment in (None, importance))

    def error(layer):
        return float((layer.integer_weight() * layer.scale[:, None] - weight)[:, :4].square().mean())

    assert error(weighted) < error(plain)
    assert weighted.record.weighted_nmse < weighted.record.weight_nmse


def test_onnx_and_safetensors_hold_the_same_codes(package):
    file = QuantizedFile(package / "quantized.safetensors")
    graph = onnx.load(package / "model.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    engine = {tensor.name: tensor for tensor in onnx.load(package / "engine/onnxruntime/model.onnx").graph.initializer}
    traced = rewritten_graph(package)
    codes = traced.codes_inputs()
    assert sum(len(traced.parts(each)) for each in codes) == len(file.records) > len(codes)  # some are merged
    for each in codes:
        name, layers = each.removesuffix(".codes"), [file.layer(part.layer) for part in traced.linear_parts(each)]
        for role in ("codes", "exponents", "scale"):
            parts = [getattr(layer, role).numpy().tobytes() for layer in layers]
            assert stored[f"{name}.{role}"].raw_data == b"".join(parts)
    for name in file.records:
        decoded = onnx.numpy_helper.to_array(engine[f"{name}.int8"]).T
        np.testing.assert_array_equal(decoded, file.layer(name).integer_weight().numpy())


def test_records_say_what_became_of_each_rotation(package):
    records = QuantizedFile(package / "quantized.safetensors").records
    folded = (".to_out.", "attn2.to_k", "attn2.to_v")  # into the value projection, and the caption projection
    for name, each in records.items():
        assert each.rotated_by == (FOLDED if any(part in name for part in folded) else ONLINE)
        values = [asdict(RotateOutput(12))] if name.endswith(".to_v") else []
        assert each.output_rotations == values
        assert each.bias in (f"{name}.bias", None) or each.bias.startswith("folded")


@pytest.fixture(params=["tlq", "codebook", "int8"])
def stored(request, tmp_path):
    """A file of one layer: writes it with changes of its record and of its tensors, and gives its path."""
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    bits, method = (8, "tlq") if request.param == "int8" else (3, request.param)
    layer = quantize_layer(weight, None, record(8, 24, bits, method=method))

    def write(tensors=None, **changes):
        held = {name: tensor for name, tensor in (layer.tensors() | (tensors or {})).items() if tensor is not None}
        records = json.dumps([asdict(layer.record) | changes])
        save_tensors_atomic(tmp_path / "q", held, {"format": "x", "layers": records})
        return tmp_path / "q"

    return write


def test_records_of_their_tensors_are_read(stored):
    assert QuantizedFile(stored()).layer("net.0").record.rows == 8


@pytest.mark.parametrize("metadata", [{}, {"layers": "{"}, {"layers": "{}"}, {"layers": '[{"layer": "x"}]'}])
def test_damaged_records_are_refused(tmp_path, metadata):
    save_tensors_atomic(tmp_path / "q", {"x.scale": torch.ones(2)}, {"format": "x"} | metadata)
    with pytest.raises(InputError, match="layer records"):
        QuantizedFile(tmp_path / "q")


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": "8"}, {"rows": 8.5}, {"rows": 0}, {"rows": 9}, {"cols": -24}, {"cols": 25}, {"bits": 5}, {"bits": 2},
        {"group_size": 0}, {"act_bits": None}, {"block": -1}, {"signs_seed": "1"}, {"method": "none"}, {"more": 1},
        {"layer": "net.1"}, {"output_rotations": [1]}, {"online_channels": [0.5, 1]},
        {"act_bits": 77}, {"block": 7}, {"block": 8, "equalizer": "?"}, {"block": 8, "equalizer": "AAAA"},
        {"online_channels": [1]}, {"block": 8, "online_channels": [0, 25]}, {"output_rotations": [{"block": 5}]},
        {"output_rotations": [{"size": 5}]}, {"block": 8, "rotated_by": "HadamardRotate", "signs_seed": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_records_of_other_fields_are_refused_in_one_line(stored, changes):
    with pytest.raises(InputError) as refused:
        QuantizedFile(stored(**changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "tensor",
    [None, torch.ones(7), torch.ones(8, dtype=torch.float64), torch.ones(8, 1)],
    ids=["absent", "too few", "of another type", "of another rank"],
)
def test_tensors_of_other_records_are_refused(stored, tensor):
    with pytest.raises(InputError, match="scale"):
        QuantizedFile(stored({"net.0.scale": tensor}))


def test_a_layer_that_was_not_quantized_is_refused(stored):
    with pytest.raises(InputError, match=r"no layer net\.1"):
        QuantizedFile(stored()).layer("net.1")


@pytest.mark.parametrize(("method", "levels"), [("tlq", "exponents"), ("codebook", "table")])
def test_two_quantizations_give_the_same_bytes(tmp_path, method, levels):
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    for name in ("a", "b"):
        layer = quantize_layer(weight, torch.ones(24), record(8, 24, 4, method=method))
        write_quantized(tmp_path / name, [layer], {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert set(TensorFile(tmp_path / "a").entries) == {"net.0.codes", f"net.0.{levels}", "net.0.scale"}


@pytest.mark.parametrize("method", ["tlq", "codebook"])
def test_zero_and_constant_weights_survive(method):
    for weight in (torch.zeros(2, 8), torch.ones(2, 8), -torch.ones(2, 8) * 1e-20):
        layer = quantize_layer(weight, None, record(2, 8, 4, method=method))
        decoded = layer.integer_weight() * layer.scale[:, None]
        assert torch.isfinite(decoded).all()
        torch.testing.assert_close(decoded, weight, rtol=1e-2, atol=1e-30)
