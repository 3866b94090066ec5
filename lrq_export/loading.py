"""`load`: a package is admitted before anything is imported that takes long, takes memory, or could be attacked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrq_export.admit import admit
from lrq_export.engine.built import FOLDERS
from lrq_export.engine.run_obstacle import version_obstacle
from lrq_export.errors import UsageError
from lrq_export.recipe import MOST_THREADS

if TYPE_CHECKING:
    from lrq_export.runtime import PackagedTransformer

AUTO = "auto"


def load(package: str | Path, *, target: str = AUTO, threads: int | None = None) -> "PackagedTransformer":
    """Open an engine of a package that `lrq-export build` wrote.

    `target`: onnxruntime, tensorrt or tensorrt-rtx; auto takes an engine for the GPU if the package holds one that
    opens here, else ONNX Runtime's (`.target` of the answer says which). `threads`: of ONNX Runtime, if not as
    session.json says.

    Raises InputError for a folder that is no package, or was edited: there is no way around the checks (`admit`); a
    package that did not change since is not hashed again. So it does for the engine of a named target that another
    version than the library here built. Raises MissingError for an engine that is not built or a runtime that is not
    here, UsageError for another target.
    """
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
        raise UsageError(
            f"threads: got {threads!r}, needed 1 to {MOST_THREADS}", hint="leave it out: as session.json says"
        )
    package = Path(package)
    manifest = admit_target(package, target)
    from lrq_export.runtime import open_admitted

    return open_admitted(package, manifest, target, threads)


def admit_target(package: Path, target: str) -> dict[str, Any]:
    """The manifest of a package that may be loaded, for a target by name or `AUTO`.

    Raises InputError for any other, as `admit` does, and for a named target's engine of another version than the
    library here.
    """
    manifest = admit(package)
    foreign = version_obstacle(package, target) if target in FOLDERS else None
    if foreign is not None:
        raise foreign
    return manifest
