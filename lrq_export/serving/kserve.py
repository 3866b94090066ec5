"""`lrq-export serve-config --kserve`: a KServe InferenceService over a Triton model repository."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrq_export.package import write_bytes_atomic
from lrq_export.serving.repository import Layout, preload, preloaded

LONGEST_NAME = 63 - len("-predictor")  # KServe makes services of names with that behind them
MOUNT = "/mnt/models"  # where KServe's runtimes find what lies at the storage URI


def write_kserve(path: Path, layout: Layout, storage: str, plan: bool = False) -> None:
    """Write a KServe InferenceService that serves a repository from `storage`, where it must be copied to.

    With a TensorRT `plan` in it, or `layout.gpu`, it asks for one GPU, and its server opens the plan's plugins first.
    """
    model: dict[str, Any] = {
        "modelFormat": {"name": "triton"},
        "protocolVersion": "v2",
        "storageUri": storage,
        "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": 8080}},
    }
    if plan or layout.gpu:
        model["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    if plan and layout.plugins:
        model["args"] = [preload(preloaded(layout, f"{MOUNT}/"))]  # KServe appends them to the runtime's own
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": service_name(layout.name)},
        "spec": {"predictor": {"model": model}},
    }
    write_bytes_atomic(path, _yaml(service).encode())


def service_name(model: str) -> str:
    """What Kubernetes takes as the name of a service: letters, digits and dashes, a letter first, no dash at an end."""
    plain = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-") or "model"
    return (plain if plain[0].isalpha() else f"m-{plain}")[:LONGEST_NAME].rstrip("-")


def _yaml(value: Mapping[str, Any], indent: str = "") -> str:
    """Nested tables of strings, numbers and lists of them as YAML, strings quoted as JSON's, which YAML reads."""
    lines = []
    for key, each in value.items():
        if isinstance(each, Mapping):
            lines.append(f"{indent}{key}:\n{_yaml(each, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(each)}\n")
    return "".join(lines)
