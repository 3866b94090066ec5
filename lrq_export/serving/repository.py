"""`lrq-export serve-config`: a package as a Triton model repository, and a KServe service over it.

    DIR/README.md   DIR/NAME/config.pbtxt   DIR/NAME/1/model.onnx
                    DIR/NAME-tensorrt/config.pbtxt   DIR/NAME-tensorrt/1/model.plan   DIR/NAME-tensorrt/plugins/*.so

A Triton that watches DIR never sees half a version: it is written under another name, then renamed.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrq_export.engine.built import FOLDERS, PLAN, TENSORRT
from lrq_export.engine.run_obstacle import without_weights
from lrq_export.engine.session_settings import SessionSettings
from lrq_export.errors import MissingError, UsageError
from lrq_export.models import family_of
from lrq_export.package import (
    MODEL,
    MODEL_DATA,
    ONNXRUNTIME_ENGINE,
    sync_folder,
    verify_hashes,
    write_bytes_atomic,
)
from lrq_export.serving.signature import inputs_of, outputs_of
from lrq_export.serving.triton import config_text, model_config, tensorrt_config

TENSORRT_PLAN = f"{FOLDERS[TENSORRT]}/{PLAN}"


@dataclass(frozen=True)
class Layout:
    """How a repository is to be written."""

    name: str
    version: int = 1
    max_batch: int = 8
    instances: int = 1
    threads: int | None = None
    portable: bool = False  # model.onnx instead of the engine with integer products
    link: bool = False
    plugins: tuple[Path, ...] = ()


def write_repository(package: Path, folder: Path, layout: Layout) -> list[Path]:
    """Write `folder`, or add a version to it. Returns the model folders. Raises UsageError for a version that is there.

    The package is checked first. A TensorRT plan in it becomes a model of its own, NAME-tensorrt; MissingError for one
    without its weights, which Triton does not bring.
    """
    manifest = verify_hashes(package)
    stripped = without_weights(package, TENSORRT)
    if stripped is not None:
        raise stripped
    plan = package / TENSORRT_PLAN
    if layout.plugins and not plan.is_file():
        raise UsageError(f"--plugins: the package has no {TENSORRT_PLAN} that would use them", hint="leave it out")
    libraries = {library.name: library.read_bytes() for library in layout.plugins}
    config = manifest["source"]["config"]
    specs = family_of(config["_class_name"]).inputs(config)
    # A shared input is the first sample's for all: requests that differ in it must not meet in one batch.
    batched = layout.max_batch > 0 and not any(spec.shared for spec in specs.values())
    files = _model_files(package, layout.portable)
    parameters = _parameters(package, layout)
    settings = model_config(
        layout.name, inputs_of(specs).values(), outputs_of(package).values(),
        max_batch=layout.max_batch if batched else 0, instances=layout.instances, parameters=parameters,
    )  # fmt: skip
    models = [_write_model(folder / layout.name, files, layout, config_text(settings))]
    if plan.is_file():
        name = f"{layout.name}-tensorrt"
        text = config_text(tensorrt_config(name, layout.instances))
        models.append(_write_model(folder / name, {PLAN: plan}, layout, text))
        for library, code in libraries.items():
            write_bytes_atomic(models[-1] / "plugins" / library, code)
    write_bytes_atomic(folder / "README.md", _readme(layout, batched, parameters, plan.is_file()).encode())
    return models


def _model_files(package: Path, portable: bool) -> dict[str, Path]:
    """The files of the model, by the name that each has beside the others."""
    source = package if portable else package / ONNXRUNTIME_ENGINE
    if not (source / MODEL).is_file():
        raise MissingError(f"{source / MODEL}: the package has none", hint="run lrq-export build again")
    return {name: source / name for name in (MODEL, MODEL_DATA) if (source / name).is_file()}


def _parameters(package: Path, layout: Layout) -> dict[str, str]:
    """What the model's session needs, by the names that Triton's ONNX Runtime backend or ONNX Runtime itself has."""
    settings = SessionSettings.read(package / ONNXRUNTIME_ENGINE)
    counts = {
        "intra_op_thread_count": layout.threads or settings.intra_op_threads,
        "inter_op_thread_count": settings.inter_op_threads,
    }
    threads = {name: str(count) for name, count in counts.items() if count}
    return threads if layout.portable else threads | dict(settings.where_products_saturate)


def _write_model(model: Path, files: Mapping[str, Path], layout: Layout, config: str) -> Path:
    version = model / str(layout.version)
    if version.exists():
        raise UsageError(f"{version}: is there already", hint=f"pass --model-version {layout.version + 1}")
    unfinished = model / f".{layout.version}.lrq-writing"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, path in files.items():
        if layout.link:
            _link(path, unfinished / name)
        else:
            shutil.copyfile(path, unfinished / name)
    write_bytes_atomic(model / "config.pbtxt", config.encode())
    os.replace(unfinished, version)
    sync_folder(model)
    return model


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError as error:
        raise UsageError(f"--link: {target}: {error.strerror}", hint="leave --link out to copy the model") from None


def _readme(layout: Layout, batched: bool, parameters: Mapping[str, str], tensorrt: bool) -> str:
    lines = [
        f"# Triton model repository of {layout.name}", "",
        "    tritonserver --model-repository=.", "",
        f"- {layout.name}: ONNX Runtime backend. Inputs and outputs are float32.",
    ]  # fmt: skip
    if batched:
        lines += [
            "- Requests of the same shapes are run as one batch. An input without an axis besides the samples",
            "  (`timestep`) is sent as (n, 1).",
        ]
    else:
        lines.append("- No batching: the model takes its batch whole, and shares inputs among its samples.")
    if "session.x64quantprecision" in parameters:
        lines += [
            "- `session.x64quantprecision` is in config.pbtxt, but Triton's stock ONNX Runtime backend hands on no",
            "  option that it does not know by name. On x86 processors without VNNI the products of this model are",
            "  WRONG without it. Deploy on processors with VNNI (`grep vnni /proc/cpuinfo`), or write the repository",
            "  with `lrq-export serve-config --portable`, or serve with `lrq-export serve`, which sets the option.",
        ]
    if tensorrt:
        name = f"{layout.name}-tensorrt"
        libraries = [f"{name}/plugins/{path.name}" for path in layout.plugins] or ["PATH/OF/THE/PLUGINS.so"]
        lines += [
            f"- {name}: TensorRT backend; Triton reads inputs and outputs from the plan. A plan with plugins needs",
            "  their library before it is loaded:", "",
            f"      tritonserver --model-repository=. --backend-config=tensorrt,plugins={';'.join(libraries)}", "",
            f"  or `LD_PRELOAD={':'.join(libraries)} tritonserver ...`. Not yet run: no GPU was at hand.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def write_kserve(path: Path, layout: Layout, storage: str) -> None:
    """Write a KServe InferenceService that serves a repository from `storage`, where it must be copied to."""
    name = re.sub(r"[^a-z0-9]+", "-", layout.name.lower()).strip("-")[:63].rstrip("-")
    if not re.match(r"[a-z]", name):
        name = f"m-{name}"
    service: dict[str, Any] = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "triton"},
                    "protocolVersion": "v2",
                    "storageUri": storage,
                    "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": 8080}},
                }
            }
        },
    }
    write_bytes_atomic(path, _yaml(service).encode())


def _yaml(value: Mapping[str, Any], indent: str = "") -> str:
    """Nested tables of strings and numbers as YAML, strings quoted as JSON's, which YAML reads."""
    lines = []
    for key, each in value.items():
        if isinstance(each, Mapping):
            lines.append(f"{indent}{key}:\n{_yaml(each, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(each)}\n")
    return "".join(lines)
