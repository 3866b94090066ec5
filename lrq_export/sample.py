"""Draw samples from a package, through diffusers' own schedulers and pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrq_export.admit import admit
from lrq_export.errors import UsageError
from lrq_export.loading import load
from lrq_export.models import family_of
from lrq_export.package import atomic_file, save_tensors_atomic
from lrq_export.progress import Progress, Silent, stage
from lrq_export.recipe import Recipe
from lrq_export.sampling import ConditionalSampler, check_steps, condition_rows, scheduler_from
from lrq_export.verify.reference import Reference

IMAGE_CHANNELS = (1, 3)
VIDEO_AXES = 5  # of what a pipeline returns: (n, frames, height, width, channels), where images have no frames


def sample_conditions(
    package: Path,
    out: Path,
    *,
    images: int | None,
    steps: int | None,
    seed: int | None,
    rows: list[int] | None,
    progress: Progress | None = None,
) -> Path:
    """Draw from the conditions that the package carries; None takes the recipe's setting. Returns the file written.

    `out` ending in .safetensors gets the latents (n, ...), in the axes of the model; any other name a PNG contact
    sheet, which needs a model of 1 or 3 channels (latents of others want their pipeline's decoder).
    """
    manifest, progress = admit(package), progress or Silent()
    _check_request(out, (".png", ".safetensors"), images, steps)
    settings = Recipe.model_validate(manifest["recipe"]).sampling
    steps = steps or settings.steps
    scheduler = scheduler_from(settings.scheduler, manifest["scheduler"])
    reference = Reference.load(package)
    conditions, family = reference.conditions, family_of(manifest["source"]["config"]["_class_name"])
    drawn, available = family.latents(reference.inputs, conditions), condition_rows(conditions)
    check_steps(scheduler, steps, drawn)
    with stage(progress, "load", {}):
        transformer = load(package)
    if out.suffix != ".safetensors" and transformer.config.in_channels not in IMAGE_CHANNELS:
        raise UsageError(
            f"{out}: this model's samples are latents of {transformer.config.in_channels} channels, not images",
            hint="name a .safetensors file, or pass --pipeline and --prompts to decode them",
        )
    chosen = rows if rows is not None else [i % available for i in range(images or settings.images)]
    with stage(progress, "sample", {}, steps):
        latents = ConditionalSampler(Counted(transformer, progress.advance), scheduler, conditions, drawn)(
            chosen, num_inference_steps=steps, guidance_scale=settings.guidance_scale,
            generator=torch.Generator().manual_seed(settings.seed if seed is None else seed),
        )  # fmt: skip
    if out.suffix == ".safetensors":
        save_tensors_atomic(out, {"samples": latents})
    else:
        write_contact_sheet(out, drawn.pictures(latents).numpy())
    return out


def sample_prompts(
    package: Path,
    out: Path,
    pipeline: Path,
    prompts: Path,
    *,
    steps: int | None,
    seed: int | None,
    progress: Progress | None = None,
) -> Path:
    """Run a whole diffusers pipeline with the package in place of its transformer; writes a PNG contact sheet.

    Of a video it shows the first frame.
    """
    from lrq_export.calibrate.pipeline import open_pipeline, what_to_draw

    _check_request(out, (".png",), None, steps)
    settings = Recipe.model_validate(admit(package)["recipe"]).sampling
    steps, progress = steps or settings.steps, progress or Silent()
    with stage(progress, "load", {}):
        whole = open_pipeline(pipeline)
        subjects = what_to_draw(whole, prompts)
        whole.set_progress_bar_config(disable=True)
        whole.register_modules(transformer=None)
        whole.transformer = Counted(load(package), progress.advance)
    with stage(progress, "sample", {}, steps):
        drawn = whole(
            subjects, num_inference_steps=steps, output_type="np",
            generator=torch.Generator().manual_seed(settings.seed if seed is None else seed),
        )[0]  # fmt: skip
    first = drawn[:, 0] if drawn.ndim == VIDEO_AXES else drawn
    write_contact_sheet(out, np.transpose(first, (0, 3, 1, 2)) * 2 - 1)
    return out


class Counted:
    """A transformer that reports every call, of which samplers make one a step; everything else is its own."""

    def __init__(self, transformer: Any, advance: Callable[[], None]):
        self._transformer, self._advance = transformer, advance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._transformer(*args, **kwargs)
        self._advance()
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)


def _check_request(out: Path, endings: tuple[str, ...], images: int | None, steps: int | None) -> None:
    """Raise UsageError before any work is done for what could not be drawn or written afterwards."""
    for flag, value in (("--images", images), ("--steps", steps)):
        if value is not None and value < 1:
            raise UsageError(f"{flag}: got {value}, needed at least 1")
    if out.suffix not in endings:
        raise UsageError(f"{out}: needed a name that ends in {' or '.join(endings)}", hint="e.g. samples.png")


def write_contact_sheet(path: Path, images: np.ndarray, columns: int = 10, enlarge_to: int = 96) -> None:
    """Images (n, 1 or 3, height, width) in [-1, 1] as one PNG, small ones enlarged pixel by pixel."""
    from PIL import Image

    count, _, height, width = images.shape
    zoom = max(1, enlarge_to // height)
    pixels = ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).repeat(zoom, axis=2).repeat(zoom, axis=3)
    if pixels.shape[1] == 1:
        pixels = pixels.repeat(3, axis=1)
    height, width, columns = height * zoom, width * zoom, min(columns, count)
    sheet = np.full((-(-count // columns) * height, columns * width, 3), 255, np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    with atomic_file(path) as file:
        Image.fromarray(sheet).save(file, format="PNG")
