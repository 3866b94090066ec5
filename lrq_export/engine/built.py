"""build.json beside an engine of TensorRT or TensorRT-RTX: what was built, of what, by which version.

`lrq_export.admit` reads it of every engine, before anything else does: what a package says here has been checked.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from lrq_export.errors import InputError
from lrq_export.recipe import Engine
from lrq_export.untrusted_json import read_json_object

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
FOLDERS = {TENSORRT: "engine/tensorrt", RTX: "engine/tensorrt-rtx"}
BUILD, PLAN = "build.json", "model.plan"
EARLIER = "earlier_weights"  # a key: the engine's are those of the package that this one was built in the place of

Count = Annotated[int, Field(ge=0)]
LeastUsualMost = Annotated[tuple[Count, Count, Count], Strict(False)]  # JSON has lists alone


class BuiltEngine(BaseModel):
    """What the readers of a build.json ask for; it may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    target: str
    version: Annotated[str, Field(max_length=64)]  # of the library that built it, and alone opens it
    plugins: bool  # whether lrq nodes are plugins
    engine_bytes: Count | None = None
    layers: Count | None = None  # of the network
    plugin_layers: Count | None = None
    profiles: Annotated[tuple[dict[str, LeastUsualMost], ...], Strict(False)] = ()  # sizes of free axes
    options: Engine = Engine()  # an engine from before a setting was there has its default
    gpu: str | None = None  # that it was built on
    warnings: Annotated[tuple[str, ...], Strict(False)] = ()
    earlier_weights: bool = False


def read_built(folder: Path) -> BuiltEngine:
    """What the engine in `folder` is. Raises InputError for a build.json that does not say it."""
    path = folder / BUILD
    try:
        return BuiltEngine.model_validate(read_json_object(path))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {where}: {first['msg']}", hint="build the engine again") from error


def built_engine(package: Path, target: str) -> BuiltEngine | None:
    """The engine of a target that a package holds; None if it holds none, or its network alone."""
    folder = package / FOLDERS[target]
    return read_built(folder) if (folder / BUILD).is_file() else None
