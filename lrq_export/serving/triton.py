"""Triton's description of a model: a `ModelConfig` of its model_config.proto, as protobuf text and as JSON."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lrq_export.serving.protocol import TensorInfo

BATCH_DELAY = 1000  # microseconds that a request waits for others of its shape
KIND_AUTO, KIND_CPU, KIND_GPU = "KIND_AUTO", "KIND_CPU", "KIND_GPU"  # AUTO: on every GPU there is, else the processor
TRITON_TYPES = {"FP16": "TYPE_FP16", "FP32": "TYPE_FP32", "FP64": "TYPE_FP64", "BOOL": "TYPE_BOOL"} | {
    name: f"TYPE_{name}" for name in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
}


class Enumerated(str):
    """The name of an enum's value: no quotes around it in protobuf's text form."""


class Table(dict):
    """A protobuf map, which its text form writes as one key and value after the other."""


def model_config(
    name: str,
    inputs: Iterable[TensorInfo],
    outputs: Iterable[TensorInfo],
    *,
    kind: str,
    platform: str = "onnxruntime_onnx",
    max_batch: int = 0,
    instances: int = 1,
    version: int = 1,
    profiles: int = 1,
    parameters: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The `ModelConfig` of one version of an engine. With `max_batch` > 0 every tensor's first axis is the batch.

    `kind`: the processors that it runs on. `profiles`: how many a plan has; Triton takes the first alone unless all
    are named. Of a plan, too, all inputs and outputs are told: with none, Triton batches whatever the plan allows.
    """
    backend, _, _ = platform.partition("_")
    instance: dict[str, Any] = {"kind": Enumerated(kind), "count": instances}
    if profiles > 1:
        instance["profile"] = [str(index) for index in range(profiles)]
    config: dict[str, Any] = {
        "name": name, "platform": platform, "backend": backend, "max_batch_size": max_batch,
        "input": [_tensor(info, max_batch > 0) for info in inputs],
        "output": [_tensor(info, max_batch > 0) for info in outputs],
        # A config describes one version, and names it: whatever else lies there, no other is served by it.
        "version_policy": {"specific": {"versions": [version]}},
        "instance_group": [instance],
    }  # fmt: skip
    if max_batch > 0:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": BATCH_DELAY}
    if parameters:
        config["parameters"] = Table({key: {"string_value": value} for key, value in parameters.items()})
    return config


def _tensor(info: TensorInfo, batched: bool) -> dict[str, Any]:
    shape = list(info.shape[1:] if batched else info.shape)
    tensor = {"name": info.name, "data_type": Enumerated(TRITON_TYPES[info.datatype]), "dims": shape or [1]}
    # Triton wants an axis besides the batch: clients send (n, 1), the model is given (n,).
    return tensor if shape else tensor | {"reshape": {"shape": []}}


def config_text(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text form."""
    lines = []
    for field, value in message.items():
        if isinstance(value, Table):
            entries = [{"key": key, "value": each} for key, each in value.items()]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            entries = value
        else:
            entries = [value]
        for entry in entries:
            if isinstance(entry, Mapping):
                lines.append(f"{indent}{field} {{\n{config_text(entry, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{field}: {_scalar(entry)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    return str(value) if isinstance(value, Enumerated) else json.dumps(value)


def config_json(message: Mapping[str, Any]) -> dict[str, Any]:
    """The same message as JSON, as Triton's own /config answers it."""
    return json.loads(json.dumps(message))
