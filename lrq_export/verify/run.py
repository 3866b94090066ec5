"""Climb the parity ladder over a package: at the end of a build, and again from its files alone with `verify`."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrq_export.admit import admit
from lrq_export.machine import describe_machine
from lrq_export.memory import give_back
from lrq_export.models import family_of
from lrq_export.package import MODEL, MODEL_DATA, ONNXRUNTIME_ENGINE, QUANTIZED
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Recipe
from lrq_export.runtime import ONNXRUNTIME, PackagedTransformer, open_runner
from lrq_export.saved_graphs import left_out
from lrq_export.source import Source, open_source_of
from lrq_export.verify import ladder, rungs
from lrq_export.verify.layers import histograms, layer_table
from lrq_export.verify.one_model import check_one_model
from lrq_export.verify.reference import Reference
from lrq_export.verify.report_engines import engine_rows
from lrq_export.verify.subject import Subject, quantized_model


def verify(
    package: str | Path, *, source: str | Path | None = None, advance: Callable[[str], None] = lambda rung: None
) -> tuple[dict[str, Any], Any]:
    """Check hashes, then climb the ladder from the package's files; returns (report, samples).

    With `source`, R0 is measured again and R3 uses the real weights; without, R0 is as recorded, R3's are random.
    Raises InputError for any edited, missing or added file.
    """
    package = Path(package)
    manifest = admit(package)
    recipe = Recipe.model_validate(manifest["recipe"])
    config = manifest["source"]["config"]
    opened = open_source_of(package, manifest, Path(source)) if source is not None else None
    return climb(package, recipe, config, opened, scheduler=manifest["scheduler"], advance=advance)


def climb(
    package: Path,
    recipe: Recipe,
    config: dict[str, Any],
    source: Source | None,
    *,
    scheduler: dict[str, Any] | None = None,
    advance: Callable[[str], None] = lambda rung: None,
) -> tuple[dict[str, Any], Any]:
    """All rungs over the files of `package`; returns (report, samples)."""
    family = family_of(config["_class_name"])
    quantized, reference = QuantizedFile(package / QUANTIZED), Reference.load(package)
    subject = Subject(package, recipe, family, config, source, quantized, reference)
    if source is None:  # of one that is at hand, all of this was checked before the build
        check_one_model(subject)
    climbed: list[ladder.Rung] = []

    def passed(rung: ladder.Rung) -> None:
        climbed.append(rung)
        give_back()
        advance(rung.rung)

    passed(rungs.r0(subject))
    model = quantized_model(family, config, quantized)
    r1, by_timestep = rungs.r1(subject, model)
    passed(r1)
    answers = rungs.torch_answers(subject, model)
    del model  # only one form of the weights is in memory at a time
    passed(rungs.r2(subject, answers))
    r3, passes = rungs.r3(subject)
    passed(r3)
    passed(rungs.r4(subject, answers))
    layers, weight_histograms = layer_table(subject), histograms(subject)
    give_back()
    transformer = PackagedTransformer(open_runner(package, ONNXRUNTIME), config)
    scheduler = source.scheduler_config() if source is not None else scheduler
    r5, trajectory, images, samples = rungs.r5(subject, transformer, scheduler)
    passed(r5)
    report = {
        "schema": 1,
        "source": {"class_name": config["_class_name"], "parameters": _parameters(quantized)},
        "machine": describe_machine(),
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "warnings": left_out(passes),
        "ladder": [rung.to_json() for rung in climbed],
        "passes": passes,
        "layers": layers,
        "histograms": weight_histograms,
        "noise_error_by_timestep": by_timestep,
        "trajectory": trajectory,
        "images": images,
        "sizes": _sizes(package, quantized),
        "engines": engine_rows(package, _parameters(quantized), recipe.engine),
        "timings": [],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return report, samples


def _sizes(package: Path, quantized: QuantizedFile) -> dict[str, Any]:
    layers = [quantized.layer(name) for name in quantized.records]
    packed = sum(layer.bytes() for layer in layers)
    fp16 = sum(2 * layer.record.rows * layer.record.cols for layer in layers)
    floats = sum(quantized.read(name).numel() for name in quantized.float_names())
    data = package / MODEL_DATA
    engine = package / ONNXRUNTIME_ENGINE
    return {
        "source_fp16_bytes": fp16 + 2 * floats,
        "packed_bytes": packed,
        "kept_float_bytes": 4 * floats,
        "model_bytes": (package / MODEL).stat().st_size + (data.stat().st_size if data.exists() else 0),
        "engine_bytes": sum(file.stat().st_size for file in engine.iterdir()),
        "packed_ratio": packed / fp16,
    }


def _parameters(quantized: QuantizedFile) -> int:
    floats = sum(quantized.read(name).numel() for name in quantized.float_names())
    return floats + sum(record.rows * record.cols for record in quantized.records.values())
