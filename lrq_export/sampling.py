"""Draw samples through a diffusers scheduler, from stored conditions instead of a text encoder."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrq_export.errors import InputError, MissingError, UsageError
from lrq_export.models.base import nest
from lrq_export.models.latents import Latents

NEGATIVE = "negative."  # prefix of the unconditional embeddings in a conditions file
SMALL_IMAGES = Latents((1, 2, 2))  # to try a scheduler on


def scheduler_from(class_name: str, config: dict[str, Any] | None = None):
    """A diffusers scheduler by class name, made from a scheduler_config.json.

    Raises UsageError when diffusers has none of that name, InputError when it cannot make one from that config, and
    MissingError when it needs a library for it that is not here.
    """
    import diffusers

    scheduler = getattr(diffusers, class_name, None)
    try:
        known = hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")  # its name in flow matching
    except ImportError as error:  # from the stand-in that diffusers has for a class whose library is missing
        raise MissingError(
            f"sampling.scheduler: {_reason(error)}", hint="install it, or set sampling.scheduler, e.g. DDIMScheduler"
        ) from error
    if not known:
        raise UsageError(f"sampling.scheduler: diffusers has no scheduler {class_name!r}", hint="e.g. DDIMScheduler")
    try:
        return scheduler.from_config(config or {"clip_sample": False, "num_train_timesteps": 1000})
    except Exception as error:  # each scheduler has its own way to refuse
        raise InputError(
            f"scheduler_config.json: diffusers cannot construct {class_name} from it: {_reason(error)}",
            hint="compare it with the scheduler_config.json the model was published with",
        ) from error


def check_steps(scheduler, steps: int, drawn: Latents = SMALL_IMAGES) -> None:
    """Try the scheduler for one step on zeros. Raises UsageError when it takes other arguments or so many steps not."""
    trial, latents = copy.deepcopy(scheduler), torch.zeros(1, *drawn.shape)
    try:
        drawn.set_timesteps(trial, steps)
        _scaled(trial, latents, trial.timesteps[0])
        stepped = _step(trial, latents, trial.timesteps[0], latents, torch.Generator())
        if not bool(stepped.isfinite().all()):
            raise ValueError("its first step gives NaN or Inf")
        if len(trial.timesteps) != steps:
            raise ValueError(f"it makes {len(trial.timesteps)} steps of {steps}")
    except Exception as error:  # each scheduler has its own way to refuse
        raise UsageError(
            f"sampling: {type(scheduler).__name__} cannot take {steps} steps here: {_reason(error)}",
            hint="set sampling.steps or sampling.scheduler, e.g. 20 and DDIMScheduler",
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _scaled(scheduler, latents: torch.Tensor, timestep) -> torch.Tensor:
    """What the model is given for latents; in flow matching the latents themselves."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


def _step(scheduler, noise: torch.Tensor, timestep, latents: torch.Tensor, generator) -> torch.Tensor:
    """One step; a stochastic scheduler draws from the generator, so that equal seeds stay equal trajectories."""
    seeded = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if seeded else {}
    return scheduler.step(noise, timestep, latents, return_dict=False, **options)[0]


def condition_rows(conditions: Mapping[str, torch.Tensor]) -> int:
    """How many rows there are to sample with; unconditional embeddings, of which one may serve all, do not count."""
    return min(len(tensor) for name, tensor in conditions.items() if not name.startswith(NEGATIVE))


class ConditionalSampler:
    """Draws latents (n, *drawn.shape) for rows of `conditions`, the transformer's other forward arguments.

    `transformer` is a diffusers model or what `lrq_export.load` returns; `drawn` is what its family draws, by default
    square images of the config's sample_size. Equal generators draw equal first latents, so that two transformers can
    be compared image by image.
    """

    def __init__(self, transformer, scheduler, conditions: Mapping[str, torch.Tensor], drawn: Latents | None = None):
        self.transformer, self.scheduler, self.conditions = transformer, scheduler, conditions
        self.drawn = _square_images(transformer.config) if drawn is None else drawn

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[int],
        *,
        num_inference_steps: int = 20,
        generator: torch.Generator | None = None,
        guidance_scale: float = 1.0,
        trajectory: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`prompts` are row numbers of the conditions. Appends the latents after every step to `trajectory`."""
        scheduler = copy.deepcopy(self.scheduler)
        self.drawn.set_timesteps(scheduler, num_inference_steps)
        conditions = self._rows(prompts, guidance_scale)
        latents = torch.randn((len(prompts), *self.drawn.shape), generator=generator)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching begins with the noise itself
        for timestep in scheduler.timesteps:
            doubled = torch.cat([latents, latents]) if guidance_scale != 1 else latents
            noise = self._predict(_scaled(scheduler, doubled, timestep), timestep, conditions)
            if guidance_scale != 1:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = _step(scheduler, noise, timestep, latents, generator)
            if trajectory is not None:
                trajectory.append(latents)
        return latents

    def _rows(self, prompts: Sequence[int], guidance_scale: float) -> dict[str, torch.Tensor]:
        rows = torch.as_tensor(list(prompts))
        wanted = {name: tensor for name, tensor in self.conditions.items() if not name.startswith(NEGATIVE)}
        count = condition_rows(self.conditions)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= count:
            raise UsageError(f"prompts: got rows {list(prompts)}, needed numbers from 0 to {count - 1}")
        picked = {name: tensor[rows] for name, tensor in wanted.items()}
        if guidance_scale == 1:
            return picked
        for name in picked:
            if NEGATIVE + name not in self.conditions:
                raise UsageError(
                    f"sampling.guidance_scale is {guidance_scale}, but the conditions hold no '{NEGATIVE}{name}'",
                    hint="set sampling.guidance_scale to 1 or add the unconditional embedding",
                )
            negative = self.conditions[NEGATIVE + name]
            picked[name] = torch.cat([negative.expand(len(rows), *negative.shape[1:]), picked[name]])
        return picked

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor]):
        arguments = self.drawn.arguments(latents, timestep, conditions)
        noise = self.transformer(**nest(arguments), return_dict=False)[0]
        return noise[:, : latents.shape[1]]  # models with learned variance predict it in the second half


def _square_images(config) -> Latents:
    return Latents((config.in_channels, config.sample_size, config.sample_size))
