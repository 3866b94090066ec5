"""`lrq-export serve-config --triton`: a package as a Triton model repository.

    DIR/README.md   DIR/NAME/config.pbtxt   DIR/NAME/1/model.onnx
                    DIR/NAME-tensorrt/config.pbtxt   DIR/NAME-tensorrt/1/model.plan   DIR/NAME-tensorrt/plugins/*.so

A Triton that watches DIR never sees half a version, nor a config beside a version that it does not describe. A version
is written under another name, then renamed. config.pbtxt names the one version that it describes, and no other is
served; it is replaced once that is there.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrq_export.engine.built import FOLDERS, PLAN, TENSORRT, built_engine
from lrq_export.engine.run_obstacle import without_weights
from lrq_export.engine.session_settings import CUDA, FOLD_BODIES, SessionSettings
from lrq_export.errors import MissingError, UsageError
from lrq_export.models import model_inputs
from lrq_export.models.base import SAMPLES
from lrq_export.package import (
    MANIFEST,
    MODEL,
    MODEL_DATA,
    ONNXRUNTIME_ENGINE,
    sync_file,
    sync_folder,
    verify_hashes,
    write_bytes_atomic,
)
from lrq_export.plugins import check_code
from lrq_export.serving.plugin_libraries import registers_itself, with_companions
from lrq_export.serving.signature import inputs_of, outputs_of
from lrq_export.serving.triton import KIND_AUTO, KIND_CPU, KIND_GPU, config_text, model_config

TENSORRT_PLAN = f"{FOLDERS[TENSORRT]}/{PLAN}"
CONFIG, PLUGINS = "config.pbtxt", "plugins"
# What it means that Triton's stock ONNX Runtime backend hands on no session option of these names.
WITHOUT_OPTION = {
    "session.x64quantprecision": "on x86 processors without VNNI the products of this model are WRONG. Deploy on "
    "processors with VNNI (`grep vnni /proc/cpuinfo`), write the repository with `lrq-export serve-config --portable`, "
    "or serve with `lrq-export serve`, which sets the option",
    "session.disable_quant_qdq": "weights are decoded anew in every run: the same numbers, slower",
    "session.force_spinning_stop": "threads spin for a while after each run, on cores that others may want",
}


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
    gpu: bool | None = None  # None: on GPUs where there are any; False: no TensorRT plan either


def write_repository(package: Path, folder: Path, layout: Layout) -> list[Path]:
    """Write `folder`, or add a version to it. Returns the model folders. Raises UsageError for a version that is there.

    The package is checked first. A TensorRT plan in it becomes a model of its own, NAME-tensorrt; MissingError for one
    without its weights, which Triton does not bring.
    """
    manifest = verify_hashes(package)
    check_plan(package, layout)
    plan = package / TENSORRT_PLAN
    libraries = {path.name: path.read_bytes() for named in layout.plugins for path in with_companions(named)}
    config = manifest["source"]["config"]
    specs = model_inputs(config, str(package / MANIFEST))
    # A shared input is the first sample's for all: requests that differ in it must not meet in one batch.
    batched = layout.max_batch > 0 and not any(spec.shared for spec in specs.values())
    files = _model_files(package, layout.portable)
    parameters = _parameters(package, layout)
    max_batch = layout.max_batch if batched else 0
    of_all = {"instances": layout.instances, "version": layout.version}
    inputs, outputs = inputs_of(specs).values(), outputs_of(package).values()
    settings = model_config(
        layout.name, inputs, outputs, max_batch=max_batch, kind=_kind(package, layout), parameters=parameters, **of_all
    )
    written, plan_batch = [(folder / layout.name, files, settings)], None
    if serves_plan(package, layout):
        name, profiles = f"{layout.name}-tensorrt", _profiles(package)
        plan_batch = _batch_of_all(profiles, max_batch)
        settings = model_config(
            name, inputs, outputs, max_batch=plan_batch, kind=KIND_GPU, platform="tensorrt_plan",
            profiles=len(profiles), **of_all,
        )  # fmt: skip
        written.append((folder / name, {PLAN: plan}, settings))
    for model, _, _ in written:
        if (model / str(layout.version)).exists():
            hint = f"pass --model-version {layout.version + 1}"
            raise UsageError(f"{model / str(layout.version)}: is there already", hint=hint)
    for library, code in libraries.items():  # before the plan that needs them
        write_bytes_atomic(folder / f"{layout.name}-tensorrt" / PLUGINS / library, code)
    for model, model_files, message in written:
        _write_model(model, model_files, layout, config_text(message))
    readme = _readme(layout, batched, parameters, plan_batch)
    write_bytes_atomic(folder / "README.md", readme.encode())
    return [model for model, _, _ in written]


def serves_plan(package: Path, layout: Layout) -> bool:
    """Whether a TensorRT plan becomes a model of the repository."""
    return layout.gpu is not False and (package / TENSORRT_PLAN).is_file()


def _profiles(package: Path) -> tuple[Mapping[str, Sequence[int]], ...]:
    built = built_engine(package, TENSORRT)
    return () if built is None else built.profiles


def _batch_of_all(profiles: Sequence[Mapping[str, Sequence[int]]], most: int) -> int:
    """The largest batch, up to `most`, that every profile takes; 0, which means no batching, for none above 1.

    Triton puts requests of one shape together before it looks for a profile that takes them.
    """
    batch = min((ranges[SAMPLES][-1] for ranges in profiles if SAMPLES in ranges), default=0)
    return min(batch, most) if batch > 1 else 0


def check_plan(package: Path, layout: Layout) -> None:
    """Raise MissingError for a plan without weights or plugins that all may change; UsageError for plugins of none."""
    served = serves_plan(package, layout)
    stripped = without_weights(package, TENSORRT) if served else None
    if stripped is not None:
        raise stripped
    if layout.plugins and not served:
        raise UsageError(f"--plugins: the package has no {TENSORRT_PLAN} that would use them", hint="leave it out")
    for library in layout.plugins:
        check_code(library)


def warnings(package: Path, layout: Layout) -> list[str]:
    """What a repository of this package cannot carry, or its plan lacks."""
    lost = [name for name in _parameters(package, layout) if name in WITHOUT_OPTION]
    said = []
    if lost:
        said.append(
            f"{layout.name}: Triton's stock ONNX Runtime backend does not hand on {', '.join(lost)}; README.md says "
            "what that means"
        )
    return said + plan_warnings(package, layout)


def plan_warnings(package: Path, layout: Layout) -> list[str]:
    """What a TensorRT plan lacks of plugins, in a repository or a service over it."""
    said = []
    for library in layout.plugins:
        if not registers_itself(library):
            said.append(
                f"{library}: Triton only opens it, which registers nothing: it links no libnvinfer; pass the library "
                "of the same build for one TensorRT, liblrq_plugins_trt*.so"
            )
    built = built_engine(package, TENSORRT) if serves_plan(package, layout) else None
    if built is not None and built.plugins and not layout.plugins:
        said.append(f"{layout.name}-tensorrt: the plan has plugins, and none were named; pass --plugins")
    return said


def _kind(package: Path, layout: Layout) -> str:
    """Where Triton runs the ONNX Runtime model: as `load` does, on CUDA where session.json names it and it is there."""
    if layout.gpu is None:
        return KIND_AUTO if CUDA in SessionSettings.read(package / ONNXRUNTIME_ENGINE).providers else KIND_CPU
    return KIND_GPU if layout.gpu else KIND_CPU


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
    # model.onnx has no integer products that could saturate, and bodies that decode its weights.
    more = dict([FOLD_BODIES]) if layout.portable else settings.where_products_saturate
    return threads | dict(settings.options) | dict(more)


def _write_model(model: Path, files: Mapping[str, Path], layout: Layout, config: str) -> None:
    unfinished = model / f".{layout.version}.lrq-writing"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, path in files.items():
        if layout.link:
            _link(path, unfinished / name)
        else:
            shutil.copyfile(path, unfinished / name)
            sync_file(unfinished / name)
    sync_folder(unfinished)
    first = not (model / CONFIG).exists()
    if first:  # a version without any config would be served by guesses; a config without its version is not served
        write_bytes_atomic(model / CONFIG, config.encode())
    os.replace(unfinished, model / str(layout.version))
    sync_folder(model)
    if not first:  # this is what switches to the new version: the config before it names another one
        write_bytes_atomic(model / CONFIG, config.encode())


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError as error:
        raise UsageError(f"--link: {target}: {error.strerror}", hint="leave --link out to copy the model") from None


def _readme(layout: Layout, batched: bool, parameters: Mapping[str, str], plan_batch: int | None) -> str:
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
    for option in (name for name in parameters if name in WITHOUT_OPTION):
        lines.append(
            f"- `{option}` is in config.pbtxt, but Triton's stock ONNX Runtime backend hands on no option that it does "
            f"not know by name. Without it, {WITHOUT_OPTION[option]}."
        )
    if plan_batch is not None:
        name = f"{layout.name}-tensorrt"
        libraries = preloaded(layout) or ["PATH/OF/THE/PLUGINS.so"]
        lines += [
            f"- {name}: TensorRT backend, {f'batches of up to {plan_batch}' if plan_batch else 'no batching'}.",
            "  A plan with plugins needs their library before it is loaded:", "",
            f"      tritonserver --model-repository=. '{preload(libraries)}'", "",
            f"  or `LD_PRELOAD={':'.join(libraries)} tritonserver ...`. Not yet run: no GPU was at hand.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def preloaded(layout: Layout, root: str = "") -> list[str]:
    return [f"{root}{layout.name}-tensorrt/{PLUGINS}/{path.name}" for path in layout.plugins]


def preload(libraries: list[str]) -> str:
    """The argument of tritonserver that opens libraries before any plan is loaded."""
    return f"--backend-config=tensorrt,plugins={';'.join(libraries)}"
