"""Why an engine of NVIDIA's cannot run on this machine: what `load`, `bench`, `verify --against` and `doctor` say."""

from pathlib import Path

from lrq_export.doctor.gpu import installed_tensorrt
from lrq_export.doctor.system import System, version_of
from lrq_export.engine.built import FOLDERS, PLAN, RTX, TENSORRT, built_engine
from lrq_export.errors import InputError, LrqError, MissingError
from lrq_export.plugins import LIBRARY

MODULES = {TENSORRT: "tensorrt", RTX: "tensorrt_rtx"}  # of Python
_ANOTHER = "find one that has"
_INSTALL = {TENSORRT: "pip install tensorrt-cu13", RTX: "pip install lrq-export[rtx]"}


def run_obstacle(package: Path, target: str, system: System | None = None) -> LrqError | None:
    """Why a target's engine in an admitted package cannot run here; None if nothing is known to be in the way.

    InputError for an engine of another version than the library here, else MissingError.
    """
    system, folder, built = system or System(), package / FOLDERS[target], built_engine(package, target)
    again = f"run lrq-export build {package} --target {target}"
    if built is None or not (folder / PLAN).is_file():
        return MissingError(f"{folder}: the package holds no {target} engine", hint=again)
    return (
        without_weights(package, target)
        or library_obstacle(target, system)
        or version_obstacle(package, target, system)
        or gpu_obstacle(target, system, _ANOTHER)
        or (_plugin_obstacle(folder, system) if built.plugins else None)
    )


def without_weights(package: Path, target: str) -> MissingError | None:
    """Why a target's engine computes nothing as it lies in a package: it was stripped. None if it has its weights."""
    built, folder = built_engine(package, target), package / FOLDERS[target]
    if built is None or not built.options.strip:
        return None
    again = f"lrq-export build {package} --target {target} --set engine.strip=false"
    return MissingError(
        f"{folder}: the engine has no weights (engine.strip)",
        hint=f"run {again}, or refit it from model.onnx beside it in a program of your own",
    )


def machine_obstacle(target: str, system: System | None = None) -> MissingError | None:
    """Why no engine of a target can run here, whatever package it is of."""
    system = system or System()
    return library_obstacle(target, system) or gpu_obstacle(target, system, _ANOTHER)


def library_obstacle(target: str, system: System) -> MissingError | None:
    if installed_tensorrt(system, target) is not None or system.folders(MODULES[target]):
        return None
    return MissingError(f"{target}: the Python package {MODULES[target]} is not installed", hint=_INSTALL[target])


def gpu_obstacle(target: str, system: System, fix: str) -> MissingError | None:
    return None if system.gpu() else MissingError(f"{target}: this machine has no CUDA GPU that torch sees", hint=fix)


def version_obstacle(package: Path, target: str, system: System | None = None) -> InputError | None:
    """Why a target's engine is not one of the library that is here, asked without torch; None if it is, or is not here.

    A library opens what its own version built. One that does not tell its version is tried.
    """
    built, folder = built_engine(package, target), package / FOLDERS[target]
    if built is None:
        return None
    here = installed_tensorrt(system or System(), target, built.version)
    if here is None or version_of(here) == version_of(built.version):
        return None
    again = f"run lrq-export build {package} --target {target}"
    return InputError(f"{folder}: the engine is of {target} {built.version}, the library here is {here}", hint=again)


def _plugin_obstacle(folder: Path, system: System) -> MissingError | None:
    try:
        found = system.plugin_library()
    except MissingError as error:  # LRQ_PLUGINS names nothing that is there
        return error
    if found is not None:
        return None
    return MissingError(
        f"{folder}: the engine needs the plugins, and {LIBRARY} is not compiled", hint="run lrq-export plugins build"
    )
