"""`lrq-export build PACKAGE --target TARGET`: what a finished package lacks of engines."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrq_export.errors import UsageError
from lrq_export.package import MANIFEST, MODEL

_OF_PACKAGES = (MANIFEST, MODEL)
_TABLE = "engine."
_WHOLE_BUILDS = ("engine.intra_op_threads", "engine.inter_op_threads")  # of ONNX Runtime's engine, which is there


def add_engines(package: Path, overrides: Mapping[str, str], others: Sequence[str], as_json: bool) -> None:
    """Build the engines that `overrides` ask for into the package; `others` are flags that only a whole build takes."""
    from lrq_export.admit import admit

    # A package may have lost its manifest, or have another kind of thing there: what is wrong with it is said below.
    if not package.exists() or (package.is_dir() and not any(os.path.lexists(package / name) for name in _OF_PACKAGES)):
        raise UsageError(
            f"{package}: is no package, and no folder was named for one",
            hint=f"lrq-export build {package} -o OUT, or name a package and --target",
        )
    admit(package)  # says what is wrong with it, before what takes long to import
    foreign = [*others, *(f"--set {key}" for key in overrides if not key.startswith(_TABLE) or key in _WHOLE_BUILDS)]
    if foreign:
        raise UsageError(
            f"{foreign[0]}: {package} is built already", hint="leave it out, or build again from the source with -o"
        )
    if "engine.targets" not in overrides:
        raise UsageError(f"{package}: is built already", hint="name an engine to add with --target")
    from lrq_export.engine.targets import add_engines as run
    from lrq_export.engine.targets import engine_warnings, finish_elsewhere
    from lrq_export.progress import shown
    from lrq_export.recipe import load_recipe

    settings = load_recipe(overrides=overrides).engine
    changed = {key.removeprefix(_TABLE) for key in overrides}
    changes = {name: value for name, value in settings.model_dump().items() if name in changed}
    with shown(as_json) as progress:
        missing = run(package, settings.targets, changes=changes, progress=progress)
    if missing:
        raise finish_elsewhere(package, missing, settings.targets)
    warnings, targets = engine_warnings(package, settings.targets), list(settings.targets)
    if as_json:
        print(json.dumps({"event": "engines", "out": str(package), "targets": targets, "warnings": warnings}))
    else:
        print(
            "\n".join([f"{package} holds engines for {', '.join(targets)}", *(f"warning: {each}" for each in warnings)])
        )
