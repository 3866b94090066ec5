"""model_ctx.onnx: one EPContext node around a TensorRT engine, so that onnxruntime.InferenceSession serves it.

ONNX Runtime's TensorRT provider deserializes the engine that the node names, instead of building one. The engine must
be of the TensorRT that the provider was linked with: the wheels of ONNX Runtime 1.31 link libnvinfer.so.10, and refuse
an engine of TensorRT 11 (docs/engines.md).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from graphs import names
from lrq_export.models.base import InputSpec
from lrq_export.package import write_bytes_atomic

CONTEXT = "model_ctx.onnx"
_CONTRIB = "com.microsoft"


def write_context(
    folder: Path, engine: str, specs: Mapping[str, InputSpec], outputs: Sequence[onnx.ValueInfoProto], version: str
) -> Path:
    """Write model_ctx.onnx beside the engine file `engine`; inputs are those of the model, all float32.

    `version` is that of the TensorRT that built the engine. Raises ValueError for an engine in another folder: the
    provider takes no path that leads out of the node's own.
    """
    if Path(engine).name != engine:
        raise ValueError(f"{engine}: the engine must lie beside {CONTEXT}")
    float_type = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info(name, float_type, spec.shape) for name, spec in specs.items()]
    node = onnx.helper.make_node(
        "EPContext", list(specs), [output.name for output in outputs], name="engine", domain=_CONTRIB,
        embed_mode=0,  # the attribute after this one is a path: protobuf ends at 2 GiB
        ep_cache_context=engine, main_context=1, source="TensorrtExecutionProvider", ep_sdk_version=version,
        onnx_model_filename="model.onnx", partition_name="whole",
    )  # fmt: skip
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "engine", inputs, outputs),
        opset_imports=[onnx.helper.make_opsetid("", names.ONNX_OPSET), onnx.helper.make_opsetid(_CONTRIB, 1)],
        ir_version=names.IR_VERSION, producer_name="lrq-export",
    )  # fmt: skip
    write_bytes_atomic(folder / CONTEXT, model.SerializeToString(deterministic=True))
    return folder / CONTEXT
