"""Models of one lrq node each, and their execution in stock ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from graphs import names
from graphs.ops import attach_bodies, register
from graphs.ops.spec import Example, OpSpec

TOKENS = ("x", "residual")  # inputs of an op with one row per token


@pytest.fixture(scope="session", autouse=True)
def _schemas() -> None:
    register()


def _cast(spec: OpSpec, example: Example, dtype: str) -> Example:
    """The example with every input of type T in another floating type."""
    numpy_type = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    inputs = [
        array.astype(numpy_type) if tensor.type == "T" else array
        for tensor, array in zip(spec.inputs, example.inputs, strict=True)
    ]
    return Example(tuple(inputs), example.attributes)


def _model(spec: OpSpec, example: Example) -> onnx.ModelProto:
    """One node: `TOKENS`, if it has them, are graph inputs with free leading dimensions; the rest are initializers."""
    tensors = {t.name: numpy_helper.from_array(a, t.name) for t, a in zip(spec.inputs, example.inputs, strict=True)}
    inputs, out_type, out_rank = [], onnx.TensorProto.FLOAT, 2
    for tokens in [tensors.pop(name) for name in TOKENS if name in tensors]:
        free = [f"n{axis}" for axis in range(len(tokens.dims) - 1)]
        inputs.append(helper.make_tensor_value_info(tokens.name, tokens.data_type, [*free, tokens.dims[-1]]))
        out_type, out_rank = tokens.data_type, len(tokens.dims)
    output = helper.make_tensor_value_info("out", out_type, [f"d{axis}" for axis in range(out_rank)])
    node = spec.node([tensor.name for tensor in spec.inputs], ["out"], name="node", **example.attributes)
    return helper.make_model(
        helper.make_graph([node], "g", inputs, [output], list(tensors.values())),
        opset_imports=[helper.make_opsetid("", names.ONNX_OPSET), helper.make_opsetid(names.DOMAIN, names.OPSET)],
        ir_version=names.IR_VERSION,
    )


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], **config: str) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@pytest.fixture
def cast() -> Callable[[OpSpec, Example, str], Example]:
    return _cast


@pytest.fixture
def one_node() -> Callable[[OpSpec, Example], onnx.ModelProto]:
    return _model


@pytest.fixture
def run_body() -> Callable[..., np.ndarray]:
    """(spec, example) -> what ONNX Runtime computes from the node's function body."""

    def run(spec: OpSpec, example: Example, **config: str) -> np.ndarray:
        feeds = {t.name: a for t, a in zip(spec.inputs, example.inputs, strict=True) if t.name in TOKENS}
        return _run(attach_bodies(_model(spec, example)), feeds, **config)

    return run
