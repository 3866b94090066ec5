"""`lrq_export.load`, which lets no package in before it imports what takes long, takes memory, or could be attacked."""

from pathlib import Path
from typing import TYPE_CHECKING

from lrq_export.admit import admit

if TYPE_CHECKING:
    from lrq_export.runtime import PackagedTransformer


def load(package: str | Path, *, target: str = "auto", threads: int | None = None) -> "PackagedTransformer":
    """Open an engine of a package that `lrq-export build` wrote; the arguments and errors of `runtime.load`.

    `target`: onnxruntime, tensorrt or tensorrt-rtx; auto takes an engine for the GPU if the package holds one that can
    run here, else ONNX Runtime's. `threads`: of ONNX Runtime, if not as session.json says.
    """
    admit(Path(package))
    from lrq_export import runtime

    return runtime.load(package, target=target, threads=threads)
