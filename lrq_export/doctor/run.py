"""All checks in order, and what they mean together."""

from collections.abc import Callable, Iterator
from pathlib import Path

from lrq_export.doctor import cpu, gpu
from lrq_export.doctor.finding import Finding, Status, wrong
from lrq_export.doctor.package import admission, engine_findings
from lrq_export.doctor.system import System
from lrq_export.errors import InputError, MissingError


def diagnose(package: Path | None = None, system: System | None = None) -> Iterator[Finding]:
    """What each check found, as soon as it did; with `package`, of that too.

    The package comes first, before checks of the machine import what takes memory; with one that is refused it ends.
    """
    manifest = None
    if package is not None:
        admitted, manifest = admission(package)
        yield admitted
        if manifest is None:
            return
    system = system or System()
    for check in (*cpu.CHECKS, *gpu.CHECKS):
        yield _guarded(check, system)
    if package is not None:
        yield from engine_findings(system, package, manifest["files"])


def exit_code(findings: list[Finding]) -> int:
    """0: the CPU path runs; 3: not this package; 4: something that it needs is missing."""
    broken = [finding for finding in findings if finding.required and finding.status is not Status.OK]
    if any(finding.name == "package" for finding in broken):
        return InputError.exit_code
    return MissingError.exit_code if broken else 0


def _guarded(check: Callable[[System], Finding], system: System) -> Finding:
    """A check that fails itself is a finding, too: the others still have something to say."""
    try:
        return check(system)
    except Exception as error:
        required = check in cpu.CHECKS
        return wrong(check.__name__, f"could not be checked: {error!r}", "report this fault of lrq-export", required)
