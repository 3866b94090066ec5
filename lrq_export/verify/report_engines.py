"""The report's section on engines: what `engine/` of a package holds, from each build.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrq_export.engine.built import EARLIER, FOLDERS, BuiltEngine, built_engine
from lrq_export.engine.targets import other_settings
from lrq_export.errors import InputError
from lrq_export.package import MODEL, ONNXRUNTIME_ENGINE, REPORT, REPORT_PAGE, write_bytes_atomic, write_json_atomic
from lrq_export.recipe import Engine, Recipe
from lrq_export.report_file import read_report
from lrq_export.verify.markup import DASH, Html, byte_size, digits, table

_END = b"</section>"
HEADS = ("Target", "State", "Size", "Bits per weight", "Plugins", "Layers", "Sizes it takes", "Version")


def engine_rows(package: Path, parameters: int, settings: Engine) -> list[dict[str, Any]]:
    """What each folder of `engine/` holds; `bits_per_weight` counts all bytes of an engine over all parameters.

    `other_settings` of a row are those of the recipe that the engine was built without: it is from before, and waits
    for a machine that can build the other.
    """
    folder = package / ONNXRUNTIME_ENGINE
    rows = [_row("onnxruntime", True, sum(file.stat().st_size for file in folder.iterdir()), parameters)]
    for target, place in FOLDERS.items():
        built = built_engine(package, target)
        if built is not None:
            rows.append(_row(target, True, built.engine_bytes, parameters) | _built(built))
            differing = other_settings(built, target, settings).items()
            rows[-1]["other_settings"] = {name: {"engine": has, "recipe": asks} for name, (has, asks) in differing}
        elif (package / place / MODEL).is_file():
            rows.append(_row(target, False, None, parameters))
    return rows


def _row(target: str, built: bool, size: int | None, parameters: int) -> dict[str, Any]:
    bits = None if size is None else round(8 * size / parameters, 3)
    return {"target": target, "built": built, "bytes": size, "bits_per_weight": bits}


def _built(built: BuiltEngine) -> dict[str, Any]:
    """What build.json says of an engine that the report shows."""
    return built.model_dump(mode="json", include={"plugins", "plugin_layers", "layers", "profiles", "version", EARLIER})


def show_engines(report: Mapping[str, Any], _: Any) -> Html | None:
    rows = report.get("engines") or []
    return table(HEADS, [_cells(row) for row in rows]) if rows else None


def _cells(row: Mapping[str, Any]) -> list[Any]:
    plugins = {None: DASH, False: "none: standard ops"}.get(row.get("plugins"), f"{row.get('plugin_layers')} layers")
    sizes = "; ".join(map(_sizes, row.get("profiles") or []))
    return [
        row.get("target"), _state(row),
        byte_size(row.get("bytes")), digits(row.get("bits_per_weight"), ".2f"), plugins,
        digits(row.get("layers")), sizes or DASH, row.get("version") or DASH,
    ]  # fmt: skip


def _state(row: Mapping[str, Any]) -> str:
    if not row.get("built"):
        return "network only: finish where its GPU is"
    differing = (row.get("other_settings") or {}).items()
    reasons = [
        f"the recipe asks for {name} {_told(of['recipe'])}, this engine has {_told(of['engine'])}"
        for name, of in differing
    ]
    if row.get(EARLIER):
        reasons.append("an earlier build of the same inputs made its weights")
    return f"built before: {'; '.join(reasons)}" if reasons else "built"


def _told(setting: Any) -> str:
    """A setting as JSON has it, but for the quotes of words."""
    return setting if isinstance(setting, str) else json.dumps(setting)


def _sizes(profile: Mapping[str, Any]) -> str:
    """An optimization profile, e.g. samples 1–4 height 64."""
    least_and_most = {axis: dict.fromkeys((least, most)) for axis, (least, _, most) in profile.items()}
    return " ".join(f"{axis} {'–'.join(map(str, sizes))}" for axis, sizes in least_and_most.items())


def check_report(package: Path) -> None:
    """Raise InputError for a package whose report cannot tell of an engine: said before one takes minutes."""
    read_report(package)
    _read_page(package)


def show_added_engines(package: Path, recipe: Recipe) -> None:
    """Write report.json and report.html of a finished package anew where engines are told, and nowhere else.

    That is what the package holds and what the recipe now asks for. The page's pictures are kept nowhere else, so its
    sections are replaced as text.
    """
    from lrq_export.verify.report_page import render_section

    report = read_report(package)
    report["recipe"] = recipe.model_dump(mode="json", by_alias=True)
    report["engines"] = engine_rows(package, report["source"]["parameters"], recipe.engine)
    page = _read_page(package)
    for anchor in ("engines", "origin"):
        start = page.find(f'<section id="{anchor}">'.encode())
        end = page.find(_END, start) + len(_END)
        if start < 0 or end < len(_END):  # the page is from before it had this section
            continue
        page = page[:start] + render_section(anchor, report).encode() + page[end:]
    write_json_atomic(package / REPORT, report)
    write_bytes_atomic(package / REPORT_PAGE, page)


def _read_page(package: Path) -> bytes:
    path = package / REPORT_PAGE
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", hint="build the package again") from error
