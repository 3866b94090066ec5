"""NVIDIA's own parser and builder accept every body, and the engine keeps packed weights packed (no GPU needed)."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from graphs.ops import OPS, attach_bodies
from graphs.ops.codebook_dequant import random_table
from graphs.ops.coded_weight import random_codes
from graphs.ops.spec import Example
from graphs.ops.twin_log_dequant import random_exponents

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install lrq-export[rtx]")
pytestmark = pytest.mark.rtx


@contextmanager
def parsed(model):
    """Yields the builder and the network that the parser makes of the model; both need the parser and logger alive."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    yield builder, network


def engine_bytes(spec, example, one_node):
    with parsed(attach_bodies(one_node(spec, example))) as (builder, network):
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        shapes = {tensor.name: array.shape for tensor, array in zip(spec.inputs, example.inputs, strict=True)}
        for name in [network.get_input(index).name for index in range(network.num_inputs)]:
            profile.set_shape(name, shapes[name], shapes[name], shapes[name])
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return engine.nbytes


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, id=name) for name, spec in OPS.items() if spec.inputs[0].name == "x"]
)
def test_the_body_builds(spec, one_node):
    for example in spec.examples(np.random.default_rng(0)):
        engine_bytes(spec, example, one_node)


def layers(network, kind, interface):
    """The layers of one kind, with the properties of its interface."""
    found = [layer for layer in map(network.get_layer, range(network.num_layers)) if layer.type == kind]
    for layer in found:
        layer.__class__ = interface
    return found


def test_the_parser_hands_epsilon_to_its_own_normalization(one_node):
    spec = OPS["LayerNormRotate"]
    for example in spec.examples(np.random.default_rng(0)):
        with parsed(attach_bodies(one_node(spec, example))) as (_, network):
            (layer,) = layers(network, trt.LayerType.NORMALIZATION, trt.INormalizationLayer)
            assert layer.epsilon == np.float32(example.attributes["epsilon"])


@pytest.mark.parametrize(
    ("op", "kind"), [("GeluRotate", "GELU_ERF"), ("GegluRotate", "GELU_ERF"), ("GeluTanhRotate", "GELU_TANH")]
)
def test_the_parser_tells_the_gelus_apart(op, kind, one_node):
    example = OPS[op].examples(np.random.default_rng(0))[0]
    with parsed(attach_bodies(one_node(OPS[op], example))) as (_, network):
        (layer,) = layers(network, trt.LayerType.ACTIVATION, trt.IActivationLayer)
        assert layer.type == getattr(trt.ActivationType, kind)


@pytest.mark.parametrize(("bits", "most"), [(4, 5.0), (3, 4.0), (2, 3.0)])
@pytest.mark.parametrize(("op", "levels"), [("TwinLogLinear", random_exponents), ("CodebookLinear", random_table)])
def test_the_engine_keeps_the_codes_packed(op, levels, bits, most, one_node):
    rows, cols = 4096, 2048  # large enough for half a megabyte of kernels to be half a bit a weight
    rng = np.random.default_rng(bits)
    codes = random_codes(rng, bits, rows, cols)
    vector = np.ones(rows, np.float32)
    inputs = (np.ones((2, cols), np.float32), codes, levels(rng, rows, 1, bits), vector, vector)
    attributes = {"bits": bits, "group_size": cols, "rows": rows, "cols": cols, "act_bits": 8}
    assert engine_bytes(OPS[op], Example(inputs, attributes), one_node) * 8 / (rows * cols) < most
