"""`lrq-export verify OUT --against TARGET`: a target of a package beside its model.onnx, in sight of the user."""

import json
from pathlib import Path
from typing import Any

from lrq_export.errors import UsageError
from lrq_export.loading import admit_target

REPLAY = ".replay"  # behind the package's name: a folder beside it


def verify_against(package: Path, target: str, inputs: str | None, bisect: bool, as_json: bool) -> int:
    """Print every rung and what `bisect` found; returns the exit code.

    `inputs`: how many of the package's own samples, or a file or folder of recorded ones. Raises the MissingError of
    what this machine lacks where nothing but weights could be compared.
    """
    admit_target(package, target)  # before what takes long to import
    from lrq_export.progress import shown, stage
    from lrq_export.verify.against import RUNGS, compare

    replay = package.resolve().with_name(package.resolve().name + REPLAY) if bisect else None
    with shown(as_json) as progress, stage(progress, f"against {target}", {}, len(RUNGS)):
        findings = compare(package, target, **chosen(inputs), replay=replay, advance=progress.advance)
    _print_json(findings) if as_json else _print(findings)
    if findings.broken:
        return 1
    if findings.not_run is not None and not findings.ran:
        raise findings.not_run
    return 0


def chosen(inputs: str | None) -> dict[str, Any]:
    """Keyword arguments of `compare`. Raises UsageError for neither a number nor something that is there."""
    if inputs is None:
        return {}
    if inputs.isdecimal() and int(inputs) > 0:
        return {"samples": int(inputs)}
    path = Path(inputs)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise UsageError(f"--inputs: {path} holds {len(found)} safetensors files, needed one", hint="name the file")
        return {"inputs": found[0]}
    if not path.is_file():
        raise UsageError(
            f"--inputs: got {inputs!r}, needed a number of samples, or recorded denoiser inputs (safetensors)"
        )
    return {"inputs": path}


def _print_json(findings: Any) -> None:
    for rung in findings.rungs:
        print(json.dumps({"event": "rung"} | rung.to_json()))
    if findings.not_run is not None:
        print(json.dumps({"event": "not run", "missing": findings.not_run.message, "fix": findings.not_run.hint}))
    if findings.bisection is not None:
        print(json.dumps(_bisected(findings.bisection)))


def _bisected(bisection: Any) -> dict[str, Any]:
    if bisection.divergence is None:
        return {"event": "no first difference", "why": bisection.lacks}
    found = bisection.divergence
    return {
        "event": "first difference", "tensor": found.tensor, "node": found.node, "op": found.op,
        "nmse": found.nmse if found.nmse < float("inf") else None, "replay": bisection.command,
    }  # fmt: skip


def _print(findings: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rung", "compares", "NMSE", "bound", "cosine", "error at 99 %", "")
    for rung in findings.rungs:
        similar = "–" if rung.cosine is None else f"{rung.cosine:.7f}"
        error = f"{rung.quantiles[0.99]:.1e}" if 0.99 in rung.quantiles else "–"
        value, bound = (f"{number:.2g}" if rung.metric == "NMSE" else rung.note for number in (rung.value, rung.bound))
        if rung.metric != "NMSE":
            value = "the same" if rung.passed else "changed"
        table.add_row(rung.rung, rung.title, value, bound, similar, error, "ok" if rung.passed else "FAILED")
    console = Console()
    console.print(table)
    if findings.broken:
        first = findings.broken[0]
        print(f"first diverging rung: {first.rung}, which blames {first.blames}")
        print(_first_difference(findings.bisection))
    if findings.not_run is not None and findings.ran:
        print(f"not run here: {findings.not_run}")


def _first_difference(bisection: Any) -> str:
    if bisection is None:
        return "--bisect finds the first tensor that differs"
    if bisection.divergence is None:
        return f"no first tensor to show: {bisection.lacks}"
    return f"{bisection.divergence.line()}\nreplay by hand: {bisection.command}"
