"""The model families, by the `_class_name` of their config."""

import difflib

from lrq_export.errors import InputError
from lrq_export.models.base import ModelFamily
from lrq_export.models.pixart import PixArt

FAMILIES: dict[str, ModelFamily] = {family.class_name: family for family in (PixArt(),)}


def family_of(class_name: str) -> ModelFamily:
    """Raises InputError naming the known classes."""
    if class_name in FAMILIES:
        return FAMILIES[class_name]
    nearest = difflib.get_close_matches(class_name, FAMILIES, n=1)
    raise InputError(
        f"config.json: got _class_name {class_name!r}, needed one of {', '.join(FAMILIES)}",
        hint=f"did you mean {nearest[0]!r}?" if nearest else "only these model families are supported so far",
    )
