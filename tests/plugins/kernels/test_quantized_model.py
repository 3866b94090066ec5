"""The layers of a quantized model on torch.ops.lrq compute what QuantizedLinear does: by the emulator, and on a GPU."""

from __future__ import annotations

from contextlib import contextmanager

import kernel_machine
import pytest
import torch

from lrq_export import kernels, torch_ops
from lrq_export.bind import quantize_layer
from lrq_export.kernel_linear import KernelLinear, put_on_kernels
from lrq_export.quant.linear import QuantizedLinear
from lrq_export.quantized import ONLINE, LayerRecord, QuantizedFile, write_quantized

OPS = ("rotate", "rotate_quantize", "decode", "dequantize", "linear", "linear_quantized")
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-3,
}  # a code beside a tie may differ by one; bfloat16 rounds x R too

# Of the records of a small package: every format, rotations whole and in part, activations kept in floating point.
LAYERS = {
    "plain": {"bits": 4},
    "rotated": {"bits": 4, "block": 64, "signs_seed": 1, "rotated_by": ONLINE, "bias": "rotated.bias"},
    "grouped": {"bits": 3, "group_size": 32, "block": 128, "rotated_by": ONLINE},
    "codebook": {"bits": 4, "method": "codebook", "act_bits": 6},
    "bytes": {"bits": 8, "block": 64, "signs_seed": 2, "rotated_by": ONLINE},
    "partly": {"bits": 4, "block": 64, "rotated_by": ONLINE, "online_channels": [64, 128], "bias": "partly.bias"},
    "floating": {
        "bits": 4,
        "act_bits": 16,
        "block": 64,
        "signs_seed": 3,
        "rotated_by": ONLINE,
        "bias": "floating.bias",
    },
}
ROWS, COLS = 24, 128


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    layers, floats = [], {}
    for name, fields in LAYERS.items():
        facts = {
            "layer": name, "rows": ROWS, "cols": COLS, "group_size": COLS, "act_bits": 8, "block": 0,
            "signs_seed": None, "rotated_by": "nothing", "reason": "a test",
        }  # fmt: skip
        record = LayerRecord(**facts | fields)
        layers.append(quantize_layer(torch.randn(ROWS, COLS, generator=generator), None, record))
        if record.bias:
            floats[record.bias] = torch.randn(ROWS, generator=generator)
    path = tmp_path_factory.mktemp("package") / "quantized.safetensors"
    write_quantized(path, layers, floats)
    return QuantizedFile(path)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where torch.ops.lrq runs; on the CPU by the emulator, which the ops have no kernel for outside this test."""
    if request.param == "cuda":
        kernel_machine.cuda_machine()
        return request.param
    library = request.getfixturevalue("emulated").kernels
    monkeypatch.setattr(torch_ops, "kernels", lambda: library)
    monkeypatch.setattr(torch_ops, "_current", no_stream)
    for name in OPS:
        op = getattr(torch_ops, name)
        op.register_kernel("cpu", op._init_fn)
    return request.param


@contextmanager
def no_stream(tensor):
    yield None


def layer_of(quantized, name, **options):
    record = quantized.records[name]
    bias = None if record.bias is None else quantized.read(record.bias)
    rotation = record.input_rotation()
    return KernelLinear(quantized.layer(name), bias, act_bits=record.act_bits, rotation=rotation, **options)


def nmse(got, needed):
    return float(((got.cpu().float() - needed) ** 2).sum() / (needed**2).sum())


@pytest.mark.parametrize("resident", [False, True], ids=["packed", "resident"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_the_kernels_computes_what_its_twin_does(quantized, device, name, dtype, resident):
    x = torch.randn(2, 5, COLS, generator=torch.Generator().manual_seed(1)).to(dtype)
    needed = quantized.module(name)(x.float())
    layer = layer_of(quantized, name, resident=resident).to(device, dtype)
    got = layer(x.to(device))
    assert got.dtype == dtype
    assert nmse(got, needed) <= TOLERANCE[dtype]
    assert torch.equal(layer(x.to(device)), got)


def test_a_perturbed_layer_is_seen(quantized, device):
    layer = layer_of(quantized, "rotated").to(device)
    x = torch.randn(5, COLS, generator=torch.Generator().manual_seed(1))
    layer.codes.view(torch.uint8)[3, 2] ^= 8  # the sign of one code
    assert nmse(layer(x.to(device)), quantized.module("rotated")(x)) > 100 * TOLERANCE[torch.float32]


def test_the_layers_of_a_model_are_replaced_and_it_computes_the_same(quantized, device):
    model = torch.nn.Sequential()
    for name in LAYERS:
        model.add_module(name, quantized.module(name))
    x = torch.randn(5, COLS, generator=torch.Generator().manual_seed(2))
    needed = [layer(x) for layer in model]
    put_on_kernels(model, quantized).to(device)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    for layer, each in zip(model, needed, strict=True):
        assert nmse(layer(x.to(device)), each) <= TOLERANCE[torch.float32]


def test_gates_residuals_and_norms_go_through(device):
    """A gate and modulations of rows that no cut in two numbers are copied to full size."""
    x, gate = torch.randn(2, 3, 5, 64, device=device), torch.randn(2, 1, 5, 64, device=device)
    y = torch.ops.lrq.rotate(x, None, 1, kernels.Prologue.RMS_NORM, gate, gate + 1, 1e-6)
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert nmse(y, (unit * gate + gate + 1).cpu()) <= 1e-12
    weight = torch.randint(-127, 128, (64, 64), device=device).to(torch.int8)
    form = torch_ops.WeightForm(64, 64, 64, kernels.Format.INT8, kernels.Layout.STORAGE, 8).values()
    scale, residual = torch.rand(64, device=device), torch.randn(2, 3, 5, 64, device=device)
    plain = torch.ops.lrq.linear(x, weight, None, scale, None, form, 8)
    gated = torch.ops.lrq.linear(x, weight, None, scale, None, form, 8, gate=gate, residual=residual)
    assert nmse(gated, (residual + gate * plain).cpu()) <= 1e-12
    codes, scales = torch.ops.lrq.rotate_quantize(x, None, 1, 8)
    again = torch.ops.lrq.linear_quantized(codes, scales, weight, None, scale, None, form, 8, torch.float32)
    assert torch.equal(again, plain)


def test_a_layer_traces_with_its_product_in_one_op(quantized):
    layer, x = layer_of(quantized, "rotated"), torch.empty(3, COLS, dtype=torch.bfloat16, device="meta")
    program = torch.export.export(layer.to("meta"), (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("lrq.linear" in target for target in called) == 1


def test_scale_and_bias_stay_float32_in_a_half_model(quantized):
    layer = layer_of(quantized, "rotated").half()
    assert (layer.scale.dtype, layer.bias.dtype, layer.codes.dtype) == (torch.float32, torch.float32, torch.int8)
