"""The engines that a package may hold beside ONNX Runtime's, and how one is added to a package that is finished."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lrq_export.admit import admit
from lrq_export.doctor.gpu import installed_tensorrt
from lrq_export.doctor.system import System, version_of
from lrq_export.engine import tensorrt
from lrq_export.engine.built import BUILD, EARLIER, FOLDERS, RTX, TENSORRT, BuiltEngine, built_engine, read_built
from lrq_export.engine.profiles import parse_profile, recorded_sizes
from lrq_export.errors import InputError, MissingError
from lrq_export.models import model_inputs
from lrq_export.models.base import InputSpec
from lrq_export.package import (
    MANIFEST,
    ONNXRUNTIME_ENGINE,
    QUANTIZED,
    RECIPE,
    is_package,
    json_bytes,
    list_files,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from lrq_export.package import write_manifest as seal
from lrq_export.progress import Progress, Silent, stage
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Engine, Recipe, to_toml
from lrq_export.saved_graphs import pass_files, rewritten_graph
from lrq_export.untrusted_json import read_json_object
from lrq_export.verify.reference import Reference
from lrq_export.workspace import open_workspace

ONNXRUNTIME = "onnxruntime"
# Of a manifest: source, recipe without engines, and files, whatever library versions made of them.
INPUTS = "inputs_fingerprint"
_SILENT = frozenset({"targets", "intra_op_threads", "inter_op_threads"})  # settings that change no engine built here
_OF_OTHERS = {TENSORRT: {"compute_capabilities"}, RTX: {"hardware"}}
_OWN = frozenset({"format", "schema", "files", "content_sha256", "manifest_sha256"})  # of a manifest, not facts


def build_targets(
    folder: Path, config: dict[str, Any], settings: Engine, progress: Progress, scratch: Path
) -> list[MissingError]:
    """Build every engine of `settings.targets` that `folder` lacks, a package or one that is becoming it.

    Each is built in `scratch`, on the same disk, and then put in the place of the one before it.

    Returns what this machine lacks for those that could not be built; all but the engine itself is written then, unless
    there is one from before, which stays as it is. Raises UsageError for profiles that do not fit the model,
    CheckFailed for an engine that TensorRT refuses.
    """
    missing: list[MissingError] = []
    for target in lacking(folder, settings):
        try:
            _build(folder, scratch / target, _request(target, folder, config, settings))
        except MissingError as error:
            missing.append(error)
        progress.advance(target)
    return missing


def _build(folder: Path, fresh: Path, request: tensorrt.Request) -> None:
    """Build one engine in `fresh` and put it into `folder`; see `build_targets`."""
    place = folder / FOLDERS[request.target]
    shutil.rmtree(fresh, ignore_errors=True)  # of a build that was killed
    fresh.mkdir(parents=True)
    if (place / tensorrt.TIMING_CACHE).is_file():  # copied: a file that is linked to the finished package never changes
        shutil.copyfile(place / tensorrt.TIMING_CACHE, fresh / tensorrt.TIMING_CACHE)
    try:
        tensorrt.build_plan(rewritten_graph(folder), QuantizedFile(folder / QUANTIZED), fresh, request)
    except MissingError as error:
        if built_engine(folder, request.target) is not None:
            kept = f"{error.message}; the {request.target} engine that was built before stays in use"
            raise MissingError(kept, hint=error.hint) from error
        if (fresh / tensorrt.MODEL).is_file():
            _replace(place, fresh)
        raise
    _replace(place, fresh)


def _replace(place: Path, fresh: Path) -> None:
    if place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(fresh, place)


def keep_engines(package: Path, folder: Path, scratch: Path, inputs_fingerprint: str) -> None:
    """Give `folder`, which is becoming the package in the place of `package`, the engines of that one.

    They took a GPU that this machine may lack. They must have been made of the same inputs, by their fingerprint; a
    package that was edited gives none. Another version of a library, or another number of threads, may round some
    weights otherwise: then build.json says so of an engine, and it stays until it can be built anew.
    """
    if not is_package(package):
        return
    try:
        manifest = admit(package)
    except InputError:
        return
    if manifest.get(INPUTS) != inputs_fingerprint:
        return
    decisive = (QUANTIZED, pass_files(folder)[-1].relative_to(folder).as_posix())
    files = manifest["files"]
    same = all(files.get(name, {}).get("sha256") == sha256_file(folder / name) for name in decisive)
    for target, engine in engines(package):
        place, fresh = folder / FOLDERS[target], scratch / target
        if place.exists():
            continue
        shutil.rmtree(fresh, ignore_errors=True)
        _link_files(engine, fresh, list_files(engine))
        if not same:
            write_json_atomic(fresh / BUILD, read_json_object(engine / BUILD) | {EARLIER: True})
        _replace(place, fresh)


def lacking(folder: Path, settings: Engine) -> list[str]:
    """The targets of `settings`, but for ONNX Runtime's, whose engine `folder` lacks or has with other settings.

    Neither has it one that the library on this machine, if there is one, does not take.
    """
    return [
        target
        for target in dict.fromkeys(settings.targets)
        if target != ONNXRUNTIME and not _is_wanted(built_engine(folder, target), target, settings)
    ]


def _is_wanted(built: BuiltEngine | None, target: str, settings: Engine) -> bool:
    """Whether an engine is the one that `settings` ask for on this machine."""
    if built is None or built.earlier_weights or not _fits_here(built, target, settings):
        return False
    if settings.plugins == "auto" and not built.plugins and tensorrt.find_library() is not None:
        return False  # they have been compiled since
    return not other_settings(built, target, settings)


def other_settings(built: BuiltEngine, target: str, settings: Engine) -> dict[str, tuple[Any, Any]]:
    """What an engine has and what `settings` ask for, where the two differ; by setting.

    Settings that change no engine of this target are left out.
    """
    asked = settings.model_dump(mode="json", exclude=set(_SILENT | _OF_OTHERS[target]))
    has = built.options.model_dump(mode="json")
    return {name: (has[name], value) for name, value in asked.items() if has[name] != value}


def _fits_here(built: BuiltEngine, target: str, settings: Engine) -> bool:
    """Whether nothing on this machine refuses an engine: another version of its library, or another GPU."""
    library, gpu = installed_tensorrt(System(), target, built.version), tensorrt.gpu_at_hand()
    if library is not None and version_of(library) != version_of(built.version):
        return False
    return target == RTX or settings.hardware != "this" or None in (gpu, built.gpu) or built.gpu == gpu


def engines(package: Path) -> Iterator[tuple[str, Path]]:
    """The targets whose engines a package holds, and their folders."""
    for target, folder in FOLDERS.items():
        if (package / folder / BUILD).is_file():
            yield target, package / folder


def engine_warnings(package: Path, targets: Sequence[str] = tuple(FOLDERS)) -> list[str]:
    """What the builds of the engines that a package holds had to say."""
    held = {target: read_built(folder) for target, folder in engines(package) if target in targets}
    return [f"{target}: {each}" for target, built in held.items() for each in built.warnings]


def add_engines(
    package: Path, targets: Sequence[str], *, changes: dict[str, Any] | None = None, progress: Progress | None = None
) -> list[MissingError]:
    """Build what a finished package lacks of `targets` and swap the package in whole; see `build_targets`.

    `changes` are fields of the recipe's engine table. An engine that is there already is built again only if it was
    built with other settings. The recipe becomes what was asked even where no engine is built: one that waits for
    another machine is not waited for any more once its settings are taken back.
    """
    from lrq_export.verify.report_engines import check_report, show_added_engines

    manifest, progress = admit(package), progress or Silent()
    check_report(package)
    if ONNXRUNTIME in targets and not (package / ONNXRUNTIME_ENGINE / tensorrt.MODEL).is_file():
        raise MissingError(
            f"{package / ONNXRUNTIME_ENGINE}: the package holds no ONNX Runtime engine",
            hint="build the package again from its source: every build writes one",
        )
    recipe = Recipe.model_validate(manifest["recipe"])
    wanted = tuple(dict.fromkeys((*recipe.engine.targets, *targets)))
    settings = Engine.model_validate(recipe.engine.model_dump() | (changes or {}) | {"targets": wanted})
    asked = settings.model_copy(update={"targets": tuple(targets)})
    if not lacking(package, asked) and settings == recipe.engine:
        return []
    key = hashlib.sha256(json_bytes([manifest["manifest_sha256"], settings.model_dump(mode="json")])).hexdigest()
    with open_workspace(package, key) as workspace:
        built = set(lacking(package, asked)) - set(lacking(workspace.path, asked))  # by a run that was killed later
        others = (MANIFEST, *(f"{FOLDERS[target]}/" for target in built))
        _link_files(package, workspace.path, [name for name in list_files(package) if not name.startswith(others)])
        with stage(progress, "engine", {}, len(lacking(package, asked))):
            missing = build_targets(workspace.path, manifest["source"]["config"], asked, progress, workspace.layers)
        recipe = recipe.model_copy(update={"engine": settings})
        write_bytes_atomic(workspace.path / RECIPE, to_toml(recipe).encode())
        show_added_engines(workspace.path, recipe)
        facts = {name: value for name, value in manifest.items() if name not in _OWN}
        seal(workspace.path, facts | {"recipe": recipe.model_dump(mode="json", by_alias=True)})
        workspace.commit()
    return missing


def finish_elsewhere(out: Path, missing: Sequence[MissingError], targets: Sequence[str]) -> MissingError:
    """The first of what is missing, and the command that goes on where it is not."""
    first = missing[0]
    chosen = " ".join(f"--target {target}" for target in targets if target != ONNXRUNTIME)
    return MissingError(
        f"{first.message}; all of {out} but the engine is written",
        hint=f"{first.hint}, then run: lrq-export build {out} {chosen}",
    )


def _request(target: str, folder: Path, config: dict[str, Any], settings: Engine) -> tensorrt.Request:
    specs = model_inputs(config, str(folder / MANIFEST))
    _check_inputs(folder, specs)
    recorded = recorded_sizes(specs, Reference.load(folder).inputs)
    profiles = [parse_profile(text, recorded, specs) for text in settings.profiles or ("",)]
    return tensorrt.Request(target, profiles, specs, settings)


def _check_inputs(folder: Path, specs: Mapping[str, InputSpec]) -> None:
    """Raise InputError for a config whose inputs are not those of the graph that engines are made of."""
    graph = {tensor.name: tuple(tensor.shape) for tensor in rewritten_graph(folder).graph.inputs}
    for name, spec in specs.items():
        got, needed = spec.shape, graph.get(name, ())
        sizes = [pair for pair in zip(got, needed, strict=False) if isinstance(pair[1], int)]  # others are free
        if len(got) != len(needed) or any(one != other for one, other in sizes):
            raise InputError(
                f"{folder / MANIFEST}: source: by its config {name} is {got}, the graph takes {needed or 'none'}",
                hint="build the package again",
            )


def _link_files(package: Path, folder: Path, files: Sequence[str]) -> None:
    """Files of a package under a second name. None is copied where the disk can do without, and none is changed."""
    for name in files:
        place = folder / name
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(package / name, place)
        except OSError:
            with suppress(FileNotFoundError):
                place.unlink()
            shutil.copyfile(package / name, place)
