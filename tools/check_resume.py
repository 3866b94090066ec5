"""Kill a build at random moments, let it resume, and compare its last bytes with those of an undisturbed build.

    python tools/check_resume.py SOURCE [--kills 10] [--seed 0] [--folder DIR] [-- BUILD FLAGS...]

Each kill is SIGKILL, anywhere between the start of the process and the time the undisturbed build took. A build that
ends before its kill is compared too, then started afresh. Exits 1 when any byte differs.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TIMED = {"manifest.json", "report.json", "report.html"}  # hold timings; content_sha256 of the manifest leaves them out
# A shell may start background jobs deaf to SIGINT, and Python children inherit that.
RUN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from lrq_export.cli import main; main()"


class Build:
    """One `lrq-export build --json` in a process of its own. `.stage` is what it is doing, None before the first."""

    def __init__(self, source: Path, out: Path, flags: list[str]):
        command = [sys.executable, "-c", RUN, "build", str(source), "-o", str(out), "--json", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.stage: str | None = None
        self.errors = ""
        self._news = threading.Condition()
        self._readers = [threading.Thread(target=self._read_events), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def wait_for(self, stage: str, timeout: float = 300) -> None:
        """Until the build begins `stage`; returns early when it ends."""
        with self._news:
            self._news.wait_for(lambda: self.stage == stage or not self._readers[0].is_alive(), timeout)

    def stop(self, sent: signal.Signals) -> int:
        self.process.send_signal(sent)
        return self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises subprocess.TimeoutExpired."""
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join()
        return code

    def _read_events(self) -> None:
        for line in self.process.stdout:
            event = json.loads(line)
            if event.get("event") == "begin":
                with self._news:
                    self.stage = event["stage"]
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def _read_errors(self) -> None:
        self.errors = self.process.stderr.read()


def lasting_bytes(package: Path) -> dict[str, str]:
    """SHA-256 of every file whose bytes the inputs decide, and the manifest's digest over them."""
    found = {"content_sha256": json.loads((package / "manifest.json").read_text())["content_sha256"]}
    for path in sorted(path for path in package.rglob("*") if path.is_file()):
        name = path.relative_to(package).as_posix()
        if name not in TIMED:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differing(got: dict[str, str], needed: dict[str, str]) -> list[str]:
    return sorted(name for name in got.keys() | needed.keys() if got.get(name) != needed.get(name))


def leftovers(out: Path) -> list[str]:
    """What a finished build should have removed from beside and inside its package."""
    beside = [path for path in out.parent.iterdir() if path != out and path.name.startswith(out.name)]
    return [str(path) for path in [*beside, *out.rglob("*.lrq-writing")]]


def finish(build: Build, out: Path, needed: dict[str, str]) -> list[str]:
    """Wait for a build and return what is wrong with its package."""
    if build.wait() != 0:
        return [f"the build failed: {build.errors}"]
    return differing(lasting_bytes(out), needed) + leftovers(out)


def check(source: Path, kills: int, seed: int, folder: Path, flags: list[str]) -> list[str]:
    """Kill and resume; returns what differs, and prints every step."""
    whole, out = folder / "whole" / "package", folder / "killed" / "package"
    started = time.perf_counter()
    build = Build(source, whole, flags)
    if build.wait() != 0:
        raise SystemExit(f"the undisturbed build failed: {build.errors}")
    seconds, needed = time.perf_counter() - started, lasting_bytes(whole)
    print(f"undisturbed: {seconds:.0f} s, {len(needed) - 1} files, {needed['content_sha256'][:12]}", flush=True)
    randomly, done = random.Random(seed), 0
    while done < kills:
        build, delay = Build(source, out, flags), randomly.uniform(0, seconds)
        try:
            build.wait(delay)
        except subprocess.TimeoutExpired:
            build.stop(signal.SIGKILL)
            done += 1
            print(f"kill {done}: after {delay:.1f} s in {build.stage or 'start-up'}", flush=True)
            continue
        wrong = finish(build, out, needed)
        print(f"finished before the kill: {wrong or 'same bytes'}", flush=True)
        if wrong:
            return wrong
        shutil.rmtree(out.parent)
    return finish(Build(source, out, flags), out, needed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to build; default: a temporary folder, removed at the end")
    own, flags = sys.argv[1:], []
    if "--" in own:  # what follows is for lrq-export build
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    with tempfile.TemporaryDirectory() as temporary:
        wrong = check(args.source, args.kills, args.seed, args.folder or Path(temporary), flags)
    print("the last bytes are the same" if not wrong else f"DIFFERENT: {wrong}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
