"""The engines that a package may hold beside ONNX Runtime's, and how one is added to a package that is finished."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lrq_export.admit import admit
from lrq_export.engine import tensorrt
from lrq_export.engine.profiles import parse_profile, recorded_sizes
from lrq_export.errors import MissingError
from lrq_export.models import family_of
from lrq_export.package import MANIFEST, QUANTIZED, RECIPE, json_bytes, list_files, write_bytes_atomic
from lrq_export.package import write_manifest as seal
from lrq_export.progress import Progress, Silent, stage
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Engine, Recipe, to_toml
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.untrusted_json import read_json_object
from lrq_export.verify.reference import Reference
from lrq_export.workspace import open_workspace

ONNXRUNTIME = "onnxruntime"
_SILENT = frozenset({"targets", "intra_op_threads", "inter_op_threads"})  # settings that change no engine built here
_OF_OTHERS = {tensorrt.TENSORRT: {"compute_capabilities"}, tensorrt.RTX: {"hardware", "refit"}}
_OWN = frozenset({"format", "schema", "files", "content_sha256", "manifest_sha256"})  # of a manifest, not facts


def build_targets(folder: Path, config: dict[str, Any], settings: Engine, progress: Progress) -> list[MissingError]:
    """Build every engine of `settings.targets` that `folder` lacks, a package or one that is becoming it.

    One that was built with other settings goes first: files of the finished package may be linked here.

    Returns what this machine lacks for those that could not be built; all but the engine itself is written then.
    Raises UsageError for profiles that do not fit the model, CheckFailed for an engine that TensorRT refuses.
    """
    missing: list[MissingError] = []
    for target in lacking(folder, settings):
        request = _request(target, folder, config, settings)
        if _built_with(folder, target) is not None:
            shutil.rmtree(folder / tensorrt.FOLDERS[target])
        try:
            tensorrt.build_plan(
                rewritten_graph(folder), QuantizedFile(folder / QUANTIZED), folder / tensorrt.FOLDERS[target], request
            )
        except MissingError as error:
            missing.append(error)
        progress.advance(target)
    return missing


def lacking(folder: Path, settings: Engine) -> list[str]:
    """The targets of `settings`, but for ONNX Runtime's, whose engine `folder` lacks or has with other settings."""
    return [
        target
        for target in dict.fromkeys(settings.targets)
        if target != ONNXRUNTIME and _built_with(folder, target) != _decisive(settings.model_dump(mode="json"), target)
    ]


def _built_with(folder: Path, target: str) -> dict[str, Any] | None:
    """What decided the engine of a target that `folder` holds; None if it holds none."""
    facts = folder / tensorrt.FOLDERS[target] / tensorrt.BUILD
    if not facts.is_file():
        return None
    # An engine from before a setting was there has its default.
    return _decisive(Engine().model_dump(mode="json") | read_json_object(facts).get("options", {}), target)


def _decisive(options: dict[str, Any], target: str) -> dict[str, Any]:
    """Those of the recipe's engine settings that change what is built for a target."""
    return {name: value for name, value in options.items() if name not in _SILENT | _OF_OTHERS[target]}


def engines(package: Path) -> Iterator[tuple[str, Path]]:
    """The targets whose engines a package holds, and their folders."""
    for target in (tensorrt.TENSORRT, tensorrt.RTX):
        if (package / tensorrt.FOLDERS[target] / tensorrt.BUILD).is_file():
            yield target, package / tensorrt.FOLDERS[target]


def add_engines(
    package: Path, targets: Sequence[str], *, changes: dict[str, Any] | None = None, progress: Progress | None = None
) -> list[MissingError]:
    """Build what a finished package lacks of `targets` and swap the package in whole; see `build_targets`.

    `changes` are fields of the recipe's engine table. An engine that is there already is built again only if it was
    built with other settings.
    """
    from lrq_export.verify.report_engines import show_added_engines

    manifest, progress = admit(package), progress or Silent()
    recipe = Recipe.model_validate(manifest["recipe"])
    wanted = tuple(dict.fromkeys((*recipe.engine.targets, *targets)))
    settings = Engine.model_validate(recipe.engine.model_dump() | (changes or {}) | {"targets": wanted})
    asked = settings.model_copy(update={"targets": tuple(targets)})
    if not lacking(package, asked):
        return []
    key = hashlib.sha256(json_bytes([manifest["manifest_sha256"], settings.model_dump(mode="json")])).hexdigest()
    with open_workspace(package, key) as workspace:
        _link_files(package, workspace.path)
        with stage(progress, "engine", {}, len(lacking(package, asked))):
            missing = build_targets(workspace.path, manifest["source"]["config"], asked, progress)
        recipe = recipe.model_copy(update={"engine": settings})
        write_bytes_atomic(workspace.path / RECIPE, to_toml(recipe).encode())
        show_added_engines(workspace.path)
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
    specs = family_of(config["_class_name"]).inputs(config)
    recorded = recorded_sizes(specs, Reference.load(folder).inputs)
    profiles = [parse_profile(text, recorded, specs) for text in settings.profiles or ("",)]
    return tensorrt.Request(target, profiles, specs, settings)


def _link_files(package: Path, folder: Path) -> None:
    """The files of a package under a second name: none is copied where the disk can do without, and none is changed."""
    for name in list_files(package):
        place = folder / name
        if name == MANIFEST or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(package / name, place)
        except OSError:
            with suppress(FileNotFoundError):
                place.unlink()
            shutil.copyfile(package / name, place)
