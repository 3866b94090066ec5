"""Compiles a diffusion transformer into a low-bit deployable package. Heavy imports happen on first use."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrq_export.calibrate.record import record
    from lrq_export.comparison.run import compare
    from lrq_export.compiler import build
    from lrq_export.errors import LrqError
    from lrq_export.loading import load
    from lrq_export.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["LrqError", "Recipe", "build", "compare", "load", "load_recipe", "record"]

_HOME = {
    "build": "lrq_export.compiler",
    "compare": "lrq_export.comparison.run",
    "record": "lrq_export.calibrate.record",
    "LrqError": "lrq_export.errors",
    "Recipe": "lrq_export.recipe",
    "load_recipe": "lrq_export.recipe",
    "load": "lrq_export.loading",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
