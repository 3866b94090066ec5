"""Build a PixArt-XL/2 of random weights and print time, peak memory, packed size and engine load time.

    python tools/measure_scale.py [WORK_FOLDER] [--blocks 28] [--default-recipe]

The build runs in a process of its own; its peak memory is what the operating system counted for it, pages of
memory-mapped files included.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import make_pixart_xl

LOAD = """
import time; started = time.perf_counter()
from pathlib import Path
from lrq_export.engine.onnxruntime import open_session
imported = time.perf_counter()
open_session(Path({folder!r}))
print(time.perf_counter() - imported)
"""
# Random weights draw no pictures: a short trajectory of one sample is enough to climb R5.
RECIPE = (
    "calibration.samples=4",
    "calibration.timesteps=4",
    "calibration.batch=1",
    "sampling.images=1",
    "sampling.steps=2",
)


def watch(command: list[str]) -> int:
    """Run a build, print the most memory it held before each of its events; returns its exit status."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        memory = ResidentMemory(process.pid)
        memory.start()
        for line in process.stdout:
            event = json.loads(line)
            is_rung = event["event"] == "advance" and event["stage"] == "verify"
            if is_rung or event["event"] == "end":
                name = event["what"] if is_rung else event["stage"]
                print(f"  {name:<10} {memory.take_peak() / 2**30:5.2f} GiB", flush=True)
        return process.wait()


class ResidentMemory(threading.Thread):
    """Reads a process's resident memory ten times a second."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status, self.peak = Path(f"/proc/{pid}/statm"), 0

    def run(self) -> None:
        with contextlib.suppress(OSError):  # the process has ended
            while True:
                self.peak = max(self.peak, int(self.status.read_text().split()[1]) * resource.getpagesize())
                time.sleep(0.1)

    def take_peak(self) -> int:
        """Bytes: the peak since the last call."""
        peak, self.peak = self.peak, 0
        return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--default-recipe", action="store_true", help="all samples and steps, as for a real model")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="pixart-xl-"))
    source, out = folder / "source", folder / f"package-{os.getpid()}"
    if not (source / "config.json").exists():
        print(f"{make_pixart_xl.write_model(source, args.blocks):,} parameters", flush=True)

    settings = [] if args.default_recipe else [flag for key in RECIPE for flag in ("--set", key)]
    started = time.perf_counter()
    command = [sys.executable, "-m", "lrq_export", "build", str(source), "-o", str(out), "--json", *settings]
    code = watch(command)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    print(f"build: exit {code}, {seconds / 60:.1f} minutes, {peak:.2f} GiB peak", flush=True)
    if code not in (0, 1):
        sys.exit(code)
    report = json.loads((out / "report.json").read_text())
    print("stages: " + ", ".join(f"{row['stage']} {row['seconds']:.0f} s" for row in report["timings"]))
    print("ladder: " + ", ".join(f"{rung['rung']} {rung['value']:.2g}" for rung in report["ladder"]))
    print(f"packed weights: {report['sizes']['packed_ratio']:.4f} of their fp16 bytes")
    engine = out / "engine" / "onnxruntime"
    loads = [float(subprocess.check_output([sys.executable, "-c", LOAD.format(folder=str(engine))])) for _ in range(3)]
    print(f"engine: {report['sizes']['engine_bytes'] / 2**20:.0f} MiB, loads in {sorted(loads)[1]:.1f} s (median of 3)")


if __name__ == "__main__":
    main()
