"""Try a config.json before anything is computed: diffusers constructs the model, and it runs once without numbers.

Diffusers checks little of a config itself: a wrong value fails deep inside a later stage. Here it is one error at once,
which names the key to blame: the one in whose place diffusers' default would do.
"""

import inspect
import reprlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lrq_export.calibrate.inputs import latent_sizes, synthetic_inputs
from lrq_export.checkpoint import check_finite
from lrq_export.errors import InputError, LrqError
from lrq_export.models.base import ModelFamily, Sizes

# Bytes of what a model computes when it is constructed, which takes several times that; 4096 pixels need 0.3 GiB.
MOST_TABLES = 1 << 29
Config = Mapping[str, Any]
T = TypeVar("T")


def construct(path: Path, family: ModelFamily, config: Config) -> nn.Module:
    """The diffusers model of the `config` that `path` holds, its parameters on the meta device.

    Raises InputError when diffusers cannot construct it, or constructs it with buffers that are NaN or Inf.
    """
    return _tried(_construct, path, family, config)


def shapes(path: Path, family: ModelFamily, config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of what a file of the model's weights holds, by name, for the `config` that `path` holds.

    No tensor is made. Raises InputError when diffusers cannot construct it, or would with enormous tables beside them.
    """
    return _tried(_shapes, path, family, config)


def run(path: Path, family: ModelFamily, config: Config) -> None:
    """Run the model of the `config` that `path` holds on the meta device, which computes shapes and no numbers.

    Raises InputError when that fails, or when what it predicts is no noise for its own latents.
    """
    _tried(_run, path, family, config)


def _construct(family: ModelFamily, config: Config) -> nn.Module:
    model = family.construct(dict(config))
    for name, buffer in model.named_buffers():
        check_finite(name, buffer)
    return model


def _shapes(family: ModelFamily, config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # where tables of positions, too, take no memory
        model = family.construct(dict(config))
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    made = sum(tensor.nbytes for name, tensor in model.named_buffers() if name not in stored)
    if made > MOST_TABLES:
        raise ValueError(f"its tables of positions take {made >> 20} MiB, needed at most {MOST_TABLES >> 20}")
    return stored


@torch.no_grad()
def _run(family: ModelFamily, config: Config) -> None:
    model = family.construct(dict(config)).to("meta")
    whole, sizes = dict(model.config), Sizes()
    specs = family.inputs(whole)
    inputs = synthetic_inputs(specs, samples=2, timesteps=1, seed=0, sizes=latent_sizes(whole))
    for name, tensor in inputs.items():
        sizes.admit(name, tuple(tensor.shape), specs[name])
    (count, channels, *size) = inputs["hidden_states"].shape
    got = family.call(model, {name: tensor.to("meta") for name, tensor in inputs.items()}).shape
    # A model that has learnt the variance predicts it in channels after those of the noise.
    if got[0] != count or got[1] < channels or list(got[2:]) != size:
        raise ValueError(f"it predicts noise of shape {tuple(got)} for latents of shape {(count, channels, *size)}")


def _tried(attempt: Callable[[ModelFamily, Config], T], path: Path, family: ModelFamily, config: Config) -> T:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a width of zero; the error says it better
        try:
            return attempt(family, config)
        except Exception as error:  # whatever diffusers and torch raise here, the config made it
            message = error.message if isinstance(error, LrqError) else str(error)
            reason = message.splitlines()[0] if message else type(error).__name__
            raise InputError(
                f"{path}: {_blamed(attempt, family, config)}: {reason}",
                hint="compare it with the config.json the model was published with",
            ) from error


def _blamed(attempt: Callable[[ModelFamily, Config], Any], family: ModelFamily, config: Config) -> str:
    """Each key that is better left to its default, with what it holds and what it needs."""
    import diffusers

    blamed = []
    for key, parameter in inspect.signature(getattr(diffusers, family.class_name)).parameters.items():
        if key not in config:
            continue
        try:
            attempt(family, {other: value for other, value in config.items() if other != key})
        except Exception:  # this key is not to blame, or not alone
            continue
        got, kind = reprlib.repr(config[key]), inspect.formatannotation(parameter.annotation)
        blamed.append(f"{key}: got {got}, needed a working {kind} such as diffusers' default {parameter.default!r}")
    return ", or ".join(blamed) or f"got values that {family.class_name} does not work with together"
