"""Who may come in: everything that is checked of a package before any of it is loaded.

In this order: the manifest and its own hash; names, sizes and permissions of all files; their hashes; then what the
files say of themselves, since hashes only prove that the files are the author's: types, shapes and places of all
tensors, the options of sessions, the kind of every engine. Nothing here loads torch, ONNX or ONNX Runtime.

The author of a package is trusted with what its graph computes: no check bounds the time and memory that takes.
"""

import reprlib
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

from lrq_export.doctor.system import version_of
from lrq_export.engine.built import BUILD, FOLDERS, PLAN, read_built
from lrq_export.engine.plan_header import plan_version
from lrq_export.errors import InputError, UsageError
from lrq_export.onnx_scan import MOST_FIELDS, MOST_OF_ALL, check_model_file
from lrq_export.package import MANIFEST, MODEL, ONNXRUNTIME_ENGINE, QUANTIZED, list_files, load_manifest, verify_hashes
from lrq_export.recipe import MOST_THREADS, Recipe
from lrq_export.tensor_header import read_header
from lrq_export.untrusted_json import read_json_object

SESSION = "session.json"
# What session.json may set: none of these names a file, loads code or writes anything.
SESSION_OPTIONS = frozenset(
    {"session.x64quantprecision", "session.disable_quant_qdq", "session.force_spinning_stop",
     "session.set_denormal_as_zero", "session.intra_op.allow_spinning", "session.inter_op.allow_spinning"}
)  # fmt: skip
PROVIDERS, THREADS = "providers", "threads"  # keys of session.json; the others hold session options
SESSION_KEYS = frozenset({"options", "config_where_products_saturate", PROVIDERS, THREADS})
SESSION_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
SESSION_THREADS = ("intra_op", "inter_op")
FIELDS_OF_AN_ENTRY = 12  # of a model's, that reading one in a header of safetensors takes as long as
MOST_SIZE = 100_000  # of a whole number in a model's config
MOST_LAYERS = 500  # of one kind
ENGINES = (".plan", ".engine")
# Fields of a manifest that loading relies on.
FACTS = {"tool": dict, "source": dict, "recipe": dict, "layers": dict, "warnings": list, "fingerprint": str}
# Where a build writes what an engine needs to be run.
PLACES = {SESSION: (ONNXRUNTIME_ENGINE,), BUILD: tuple(FOLDERS.values())}
REQUIRED = (MODEL, QUANTIZED)

_admitted: set[tuple] = set()


def admit(package: Path) -> dict[str, Any]:
    """The manifest of a package that may be loaded. Raises InputError for any other.

    A package that was admitted before in this process is not hashed again unless a file of it changed.
    """
    package = Path(package)
    if not (package / MANIFEST).is_file() or (package / MANIFEST).is_symlink():
        return load_manifest(package)  # which says what is wrong
    signature = _signature(package)
    if signature in _admitted:
        return load_manifest(package)
    manifest = verify_hashes(package)
    _check_facts(package / MANIFEST, manifest)
    for name in REQUIRED:
        if name not in manifest["files"]:
            raise InputError(f"{package / name}: is missing", hint="build the package again")
    _check_files(package, manifest["files"])
    _, tensors = read_header(package / QUANTIZED)
    layers = min(MOST_LAYERS, sum(entry.begin < entry.end for entry in tensors.values()))
    _check_sizes(package / MANIFEST, manifest["source"]["config"], layers)
    if _signature(package) != signature:
        raise InputError(f"{package}: changed while it was checked", hint="wait until it is written, then try again")
    _admitted.add(signature)
    return manifest


def _signature(package: Path) -> tuple:
    """What changes whenever a file of the package does: nobody can set the time of a change (ctime)."""
    facts = [(".", package.stat())] + [(name, (package / name).stat()) for name in list_files(package)]
    return (
        str(package.resolve()),
        *((name, each.st_ino, each.st_mode, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for name, each in facts),
    )


def _check_facts(path: Path, manifest: dict[str, Any]) -> None:
    for key, kind in FACTS.items():
        if not isinstance(manifest.get(key), kind):
            raise InputError(
                f"{path}: {key}: got {type(manifest.get(key)).__name__}, needed {kind.__name__}",
                hint="build the package again",
            )
    config = manifest["source"].get("config")
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise InputError(f"{path}: source: needed the config of a model", hint="build the package again")
    if not isinstance(manifest["source"].get("fingerprint"), str):
        raise InputError(f"{path}: source: needed its fingerprint", hint="build the package again")
    if not isinstance(manifest.get("scheduler", False), dict | None):
        raise InputError(f"{path}: scheduler: needed an object or null", hint="build the package again")
    try:
        Recipe.model_validate(manifest["recipe"])
    except (ValueError, UsageError) as error:
        raise InputError(f"{path}: recipe: {error}", hint="build the package again") from error


def _check_sizes(path: Path, config: dict[str, Any], layers: int) -> None:
    """Raise InputError for a config of sizes that no model has, or of more than so many layers."""
    for key, value in config.items():
        most = layers if key.endswith("layers") else MOST_SIZE
        for size in value if isinstance(value, list) else [value]:
            if type(size) is int and not 0 <= size <= most:
                raise InputError(
                    f"{path}: source: {key}: got {reprlib.repr(size)}, needed 0 to {most}",
                    hint="build the package again",
                )


def _check_files(package: Path, files: dict[str, Any]) -> None:
    """Raise InputError for a file that is not what its name says, and for more of their kinds than a build writes."""
    fields, places = 0, {name: PurePosixPath(name) for name in files}
    beside: dict[PurePosixPath, set[str]] = defaultdict(set)
    for place in places.values():
        beside[place.parent].add(place.name)
    for name, place in places.items():
        path = package / name
        if place.suffix == ".onnx":
            fields += check_model_file(path, beside[place.parent], min(MOST_FIELDS, MOST_OF_ALL - fields))
        elif place.suffix == ".safetensors":
            metadata, entries = read_header(path)
            axes = sum(len(entry.shape) for entry in entries.values())
            fields += FIELDS_OF_AN_ENTRY * (len(metadata) + len(entries)) + axes
            if fields > MOST_OF_ALL:
                raise InputError(
                    f"{path}: got more tensors and metadata than a package has, with those of the files before it",
                    hint="do not use this package unless you trust its source",
                )
        elif place.suffix in ENGINES:
            plan_version(path)
        elif place.name in PLACES:
            _check_facts_of_engine(package, place, files)


def _check_facts_of_engine(package: Path, place: PurePosixPath, files: dict[str, Any]) -> None:
    """Raise InputError for a session.json or build.json that is none, or lies where no build writes one."""
    path, places = package / place, PLACES[place.name]
    if place.parent.as_posix() not in places:
        raise InputError(f"{path}: does not belong there, but in {' or '.join(places)}", hint="remove it")
    if place.name == SESSION:
        _check_session(path)
        return
    plan = files.get((place.parent / PLAN).as_posix())
    _check_built(path, plan and plan["bytes"])


def _check_built(path: Path, plan_bytes: int | None) -> None:
    """Raise InputError for a build.json that tells of another engine than the plan of so many bytes beside it."""
    built, target = read_built(path.parent), path.parent.name
    if built.target != target:
        raise InputError(f"{path}: got the target {built.target!r}, needed {target}", hint="build it again")
    if plan_bytes is None:
        return
    if built.engine_bytes not in (None, plan_bytes):
        raise InputError(
            f"{path}: engine_bytes: got {built.engine_bytes}, and {PLAN} has {plan_bytes}", hint="build it again"
        )
    told, written = version_of(built.version), plan_version(path.with_name(PLAN))
    if written is not None and any(part % 256 != own for part, own in zip(told, written, strict=False)):
        raise InputError(
            f"{path.with_name(PLAN)}: got an engine of version {'.'.join(map(str, written))}, "
            f"and {BUILD} says {built.version}",
            hint="build it again",
        )


def _check_session(path: Path) -> None:
    settings = read_json_object(path)
    for value in settings.values():
        for key in value if isinstance(value, dict) and value is not settings.get(THREADS) else ():
            if key not in SESSION_OPTIONS or value[key] not in ("0", "1"):
                raise _bad_session(f"{path}: got the session option {key!r}", ", ".join(sorted(SESSION_OPTIONS)))
    for key, value in settings.items():
        if key not in SESSION_KEYS or (key != PROVIDERS and not isinstance(value, dict)):
            raise _bad_session(f"{path}: got the key {key!r}", f"objects named {', '.join(sorted(SESSION_KEYS))}")
    providers = settings.get(PROVIDERS)
    if not isinstance(providers, list) or not all(isinstance(name, str) for name in providers):
        raise InputError(f"{path}: providers: needed a list of names", hint="build the package again")
    for name in providers:
        if name not in SESSION_PROVIDERS:
            raise _bad_session(f"{path}: got the provider {name!r}", ", ".join(SESSION_PROVIDERS))
    for name, count in settings.get(THREADS, {}).items():
        if name not in SESSION_THREADS or type(count) is not int or not 0 <= count <= MOST_THREADS:
            raise _bad_session(
                f"{path}: threads: got {name!r}: {count!r}", f"{' and '.join(SESSION_THREADS)}, 0 to {MOST_THREADS}"
            )


def _bad_session(got: str, needed: str) -> InputError:
    return InputError(f"{got}, needed some of {needed}", hint="do not use this package unless you trust its source")
