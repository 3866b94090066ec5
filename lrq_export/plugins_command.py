"""`lrq-export plugins`: the C++ side, compiled where it runs."""

from pathlib import Path
from typing import Annotated

import typer

from lrq_export.several_values import SeveralValues

plugins = typer.Typer(no_args_is_help=True, help="Compile the TensorRT plugins, and find them.")


@plugins.command(cls=SeveralValues)
def build(
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the libraries; default: one in the user's cache.")
    ] = None,
    architectures: Annotated[
        list[str] | None,
        typer.Option(help="GPUs to compile for, e.g. 89 90a; default: those of this machine, or all."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers at once; default: as memory allows.")] = None,
    define: Annotated[list[str] | None, typer.Option("-D", help="A definition for CMake, NAME=VALUE.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable lines instead of a bar.")] = False,
) -> None:
    """Compile the kernels and the plugins with CMake. Needs a C++ compiler, CUDA and TensorRT's headers."""
    import json

    from lrq_export.plugins import build as run
    from lrq_export.progress import shown

    chosen = None if architectures is None else [each for part in architectures for each in part.split(",") if each]
    with shown(as_json) as progress:
        built = run(out, architectures=chosen, options=define or (), jobs=jobs, progress=progress)
    if as_json:
        libraries = [str(library) for library in built.libraries]
        print(json.dumps({"event": "built", "libraries": libraries, "left_out": list(built.left_out)}))
        return
    for library in built.libraries:
        print(library)
    for reason in built.left_out:
        print(reason)


@plugins.command()
def path() -> None:
    """Print the library that is used: what LRQ_PLUGINS names, or what `lrq-export plugins build` made."""
    from lrq_export.errors import MissingError
    from lrq_export.plugins import default_folder, find_library

    found = find_library()
    if found is None:
        raise MissingError(f"no plugins in {default_folder()}", hint="run lrq-export plugins build")
    print(found)
