"""The model families, by the `_class_name` of their config."""

from lrq_export.errors import InputError
from lrq_export.models.base import ModelFamily
from lrq_export.models.dit import DiT
from lrq_export.models.pixart import PixArt
from lrq_export.recipe import nearest

FAMILIES: dict[str, ModelFamily] = {family.class_name: family for family in (PixArt(), DiT())}


def family_of(class_name: str, where: str = "config.json") -> ModelFamily:
    """Raises InputError naming the known classes; `where` is the file that names this one."""
    if class_name in FAMILIES:
        return FAMILIES[class_name]
    near = nearest(class_name, FAMILIES)
    raise InputError(
        f"{where}: got _class_name {class_name!r}, needed one of {', '.join(FAMILIES)}",
        hint=f"did you mean {near!r}?" if near else "only these model families are supported so far",
    )
