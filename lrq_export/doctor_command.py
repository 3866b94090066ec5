"""`lrq-export doctor`: what this machine lacks, and how to mend it."""

import json
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    package: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="A package, to be checked as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable lines.")] = False,
) -> None:
    """Check this machine, one line each: ok, or what is wrong and how to fix it. Exits 0 if the CPU path runs."""
    from lrq_export.doctor.run import diagnose, exit_code

    findings = []
    for finding in diagnose(package):
        findings.append(finding)
        print(json.dumps({"event": "finding"} | finding.to_json()) if as_json else finding.line(), flush=True)
    raise typer.Exit(exit_code(findings))
