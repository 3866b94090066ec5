"""The model families, by the `_class_name` of their config."""

import inspect
from collections.abc import Mapping
from typing import Any

from lrq_export.errors import InputError
from lrq_export.models.base import InputSpec, ModelFamily
from lrq_export.models.dit import DiT
from lrq_export.models.flux import Flux
from lrq_export.models.pixart import PixArt
from lrq_export.models.sd3 import SD3
from lrq_export.models.wan import Wan
from lrq_export.recipe import nearest

FAMILIES: dict[str, ModelFamily] = {family.class_name: family for family in (PixArt(), DiT(), Flux(), SD3(), Wan())}


# Checkpoints published before diffusers 0.29 say Transformer2DModel, and which model that is by their norm_type.
LEGACY_CLASS = "Transformer2DModel"
LEGACY_CLASSES = {"ada_norm_single": PixArt.class_name, "ada_norm_zero": DiT.class_name}


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the `_class_name` of today, as diffusers maps it, and without keys that this class never had."""
    import diffusers

    kind = config.get("norm_type")
    if config["_class_name"] != LEGACY_CLASS or not isinstance(kind, str) or kind not in LEGACY_CLASSES:
        return dict(config)
    known = inspect.signature(getattr(diffusers, LEGACY_CLASSES[kind])).parameters
    kept = {key: value for key, value in config.items() if key in known or key.startswith("_")}
    return kept | {"_class_name": LEGACY_CLASSES[kind]}


def model_inputs(config: Mapping[str, Any], where: str) -> dict[str, InputSpec]:
    """What the model of a config takes. Raises InputError for a config that says no such thing; `where` it stands."""
    family = family_of(config["_class_name"], where)
    try:
        return family.inputs(dict(config))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{where}: not a config of {config['_class_name']}: {error!r}", hint="build the package again"
        ) from error


def family_of(class_name: str, where: str = "config.json") -> ModelFamily:
    """Raises InputError naming the known classes; `where` is the file that names this one."""
    if class_name in FAMILIES:
        return FAMILIES[class_name]
    near = nearest(class_name, FAMILIES)
    raise InputError(
        f"{where}: got _class_name {class_name!r}, needed one of {', '.join(FAMILIES)}",
        hint=f"did you mean {near!r}?" if near else "only these model families are supported so far",
    )
