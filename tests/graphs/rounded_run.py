"""Run a model in half precision so that every tensor is rounded to the type that the graph gives it.

ONNX Runtime's CPU provider computes float16 nodes in float32 and leaves out the Casts between two of them: a square
past 65504 comes through. It has hardly a kernel of bfloat16. So each node is a session of its own here, in float32, and
what it puts out is rounded by numpy.
"""

from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (lets numpy know bfloat16)
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def run_rounded(model: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor that the model is given and computes, halves as float32. Its bodies are attached."""
    halves = {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in (*model.graph.value_info, *model.graph.output, *model.graph.input)
        if value.type.tensor_type.elem_type in HALF
    }
    held = {tensor.name: _in_float32(tensor) for tensor in model.graph.initializer}

    def rounded(name: str, array: np.ndarray) -> np.ndarray:
        return array.astype(halves[name]).astype(np.float32) if name in halves else array

    with np.errstate(over="ignore"):
        known = {name: rounded(name, np.asarray(array)) for name, array in feed.items()}
        for node in model.graph.node:
            known |= {name: rounded(name, array) for name, array in _run_node(model, node, held, known).items()}
    return known


def _in_float32(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in HALF:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _run_node(
    model: onnx.ModelProto, node: onnx.NodeProto, held: Mapping[str, TensorProto], known: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    for attribute in alone.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALF:
            attribute.i = TensorProto.FLOAT
    read = [name for name in dict.fromkeys(node.input) if name]
    fed = {name: known[name] for name in read if name not in held}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in fed.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    weights = [held[name] for name in read if name in held]
    single = helper.make_model(
        helper.make_graph([alone], "node", inputs, outputs, weights),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        functions=[function for function in model.functions if function.name == node.op_type],
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(single.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in outputs]
    return dict(zip(names, session.run(names, fed), strict=True))
