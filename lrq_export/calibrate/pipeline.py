"""Calibration from a whole diffusers pipeline and a list of prompts: record, then build from the recording."""

import hashlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lrq_export.calibrate.record import record
from lrq_export.checkpoint import open_checkpoint
from lrq_export.errors import InputError, UsageError
from lrq_export.recipe import Recipe
from lrq_export.source import EVALUATION_SAMPLES


def read_prompts(path: Path) -> list[str]:
    """Non-empty lines of a UTF-8 text file. Raises InputError when there are none or it cannot be read."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}", hint="one prompt a line, UTF-8") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"{path}: got no prompts, needed at least one", hint="one prompt a line")
    return prompts


def open_pipeline(path: Path):
    """The diffusers pipeline of a folder, in float32, never from a pickle. Raises InputError when that cannot be."""
    from diffusers import DiffusionPipeline

    # Asked for without accelerate, which is no requirement of ours, diffusers prints six lines about it.
    sparing = importlib.util.find_spec("accelerate") is not None
    try:
        return DiffusionPipeline.from_pretrained(
            path, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=sparing, use_safetensors=True
        )
    except (OSError, ValueError, ImportError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: diffusers cannot load this pipeline: {reason}") from error


def what_to_draw(pipeline: Any, prompts: Path) -> list[str] | list[int]:
    """What a pipeline takes for the lines of a file: prompts as they are, classes by number or by a name it knows.

    Raises InputError for a line that is no class.
    """
    lines = read_prompts(prompts)
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        return lines
    number_of = getattr(pipeline, "labels", None) or {}
    classes = range(pipeline.transformer.config.num_embeds_ada_norm)
    chosen = [int(line) if line.isdecimal() else number_of.get(line, -1) for line in lines]
    for line, number in zip(lines, chosen, strict=True):
        if number not in classes:
            raise InputError(
                f"{prompts}: got {line!r}, needed a class, 0 to {classes[-1]}: the pipeline takes no prompts",
                hint="one class a line, its number" + (f" or its name, e.g. {min(number_of)}" if number_of else ""),
            )
    return chosen


def record_prompts(source: Path, prompts: Path, recipe: Recipe, beside: Path) -> Path:
    """Run the pipeline at `source` over the prompts and return the calibration file, which lies beside `beside`.

    The name carries a digest of everything that decides the recording, so that a second call finds the first's file.
    Raises UsageError when `source` is a transformer without its pipeline.
    """
    checkpoint, texts = open_checkpoint(source), read_prompts(prompts)
    if checkpoint.pipeline_path is None:
        raise UsageError(
            f"{source}: got a transformer alone, but --prompts needs its whole pipeline",
            hint="pass the pipeline's folder, or --calibration with recorded inputs",
        )
    samples = recipe.calibration.samples + EVALUATION_SAMPLES
    parts = [checkpoint.fingerprint(), *texts, samples, recipe.sampling.steps, recipe.calibration.seed]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]
    path = beside.with_name(f"{beside.name}.calibration-{digest}.safetensors")
    if not path.exists():
        pipeline = open_pipeline(checkpoint.pipeline_path)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(recipe.calibration.seed)
        try:
            record(
                pipeline, what_to_draw(pipeline, prompts), path, samples=samples,
                num_inference_steps=recipe.sampling.steps, output_type="latent", generator=generator,
            )  # fmt: skip
        except ValueError as error:  # what diffusers raises for inputs that a pipeline does not take
            reason = " ".join(str(error).split())
            raise InputError(
                f"{checkpoint.pipeline_path}: the pipeline refused to run: {reason}",
                hint="record with lrq_export.record and arguments of your own, then pass --calibration",
            ) from error
    return path
