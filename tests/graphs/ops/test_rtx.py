"""NVIDIA's own parser and builder accept every body, and the engine keeps packed weights packed (no GPU needed)."""

from __future__ import annotations

import numpy as np
import pytest

from graphs.ops import OPS, attach_bodies
from graphs.ops.codebook_dequant import random_table
from graphs.ops.coded_weight import random_codes
from graphs.ops.spec import Example
from graphs.ops.twin_log_dequant import random_exponents

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install lrq-export[rtx]")
pytestmark = pytest.mark.rtx


def engine_bytes(model):
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor in map(network.get_input, range(network.num_inputs)):
        shape = [max(size, 2) for size in tensor.shape]
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return engine.nbytes


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, id=name) for name, spec in OPS.items() if spec.inputs[0].name == "x"]
)
def test_the_body_builds(spec, one_node):
    for example in spec.examples(np.random.default_rng(0)):
        engine_bytes(attach_bodies(one_node(spec, example)))


@pytest.mark.parametrize(("bits", "most"), [(4, 5.0), (3, 4.0), (2, 3.0)])
@pytest.mark.parametrize(("op", "levels"), [("TwinLogLinear", random_exponents), ("CodebookLinear", random_table)])
def test_the_engine_keeps_the_codes_packed(op, levels, bits, most, one_node):
    rows, cols = 4096, 2048  # large enough for half a megabyte of kernels to be half a bit a weight
    rng = np.random.default_rng(bits)
    codes = random_codes(rng, bits, rows, cols)
    vector = np.ones(rows, np.float32)
    inputs = (np.ones((2, cols), np.float32), codes, levels(rng, rows, 1, bits), vector, vector)
    attributes = {"bits": bits, "group_size": cols, "rows": rows, "cols": cols, "act_bits": 8}
    model = attach_bodies(one_node(OPS[op], Example(inputs, attributes)))
    assert engine_bytes(model) * 8 / (rows * cols) < most
