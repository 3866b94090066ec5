"""`lrq-export bench`: a package's targets beside the floating-point model it was made from.

All of them run turn by turn in one process, so that a slow moment of the machine hits them alike; what each needs in
memory is measured in a process of its own:

    python -m lrq_export.bench PACKAGE TARGET BATCH THREADS [SOURCE]        prints bytes
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lrq_export.errors import CheckFailed, UsageError
from lrq_export.layer_times import layer_times
from lrq_export.machine import describe_machine
from lrq_export.models import family_of
from lrq_export.package import load_manifest, verify_hashes
from lrq_export.progress import Progress, Silent, stage
from lrq_export.runtime import ONNXRUNTIME, TARGETS, feeds, load, obstacle, tensors
from lrq_export.source import open_source, open_source_of
from lrq_export.verify.reference import Reference

BASELINES = {"torch fp32": torch.float32, "torch bf16": torch.bfloat16}
PERCENTILES = (50, 90, 99)
Run = Callable[[], Any]


def bench(
    package: Path,
    *,
    source: Path | None = None,
    batches: tuple[int, ...] = (1,),
    runs: int = 30,
    threads: int | None = None,
    layers: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rows of latency, throughput and memory, one for each batch and target that can run here; baselines with `source`.

    With `layers`, also what each layer of each target takes, the slowest first. Inputs are those that the package keeps
    to be judged by. `speedup` is against the fastest baseline of the batch.
    Raises InputError for a bad package, or a source that the package was not built from.
    """
    progress = progress or Silent()
    manifest = verify_hashes(package)
    if source is not None:
        open_source_of(package, manifest, source)
    names = [target for target in TARGETS if obstacle(package, target) is None]
    names += list(BASELINES) if source is not None else []
    if threads is not None:
        torch.set_num_threads(threads)
    rows, timed_layers, timings = [], [], {}
    for batch in batches:
        inputs = inputs_of(package, batch)
        with stage(progress, f"batch {batch}", timings, runs + 1):
            opened = {name: open_run(package, name, inputs, threads, source) for name in names}
            milliseconds = timed(opened, runs, progress)
            del opened
        for target in (name for name in names if layers and name in TARGETS):
            found = layer_times(package, target, inputs, runs, threads)
            timed_layers += [{"batch": batch, "target": target} | each.row() for each in found]
        for name in names:
            rows.append({"batch": batch, "target": name} | figures(milliseconds[name], batch))
            rows[-1]["peak_mib"] = round(peak_bytes(package, name, batch, threads, source) / 2**20, 1)
    for row in rows:
        baselines = [other for other in rows if other["batch"] == row["batch"] and other["target"] in BASELINES]
        fastest = min((other["p50_ms"] for other in baselines), default=None)
        row["speedup"] = None if fastest is None else round(fastest / row["p50_ms"], 3)
    return {
        "machine": describe_machine(), "threads": threads, "runs": runs, "rows": rows, "layers": timed_layers,
    }  # fmt: skip


def require_speedup(report: dict[str, Any], needed: float) -> None:
    """Raise CheckFailed for a batch in which no target is `needed` times as fast as the fastest baseline."""
    for batch in dict.fromkeys(row["batch"] for row in report["rows"]):
        ours = [row for row in report["rows"] if row["batch"] == batch and row["target"] in TARGETS]
        best = max(ours, key=lambda row: row["speedup"])
        if best["speedup"] < needed:
            raise CheckFailed(
                f"batch {batch}: {best['target']} is {best['speedup']:.2f} times as fast as the fastest baseline, "
                f"needed {needed:g}"
            )


def inputs_of(package: Path, batch: int) -> dict[str, torch.Tensor]:
    """`batch` rows of the package's evaluation inputs, repeated where there are fewer."""
    recorded = Reference.load(package).inputs
    rows = torch.arange(batch) % len(recorded["hidden_states"])
    return {name: tensor[rows] for name, tensor in recorded.items()}


def open_run(
    package: Path, name: str, inputs: dict[str, torch.Tensor], threads: int | None, source: Path | None
) -> Run:
    """What runs a target or baseline once on `inputs`."""
    if name in TARGETS:
        runner = load(package, target=name, threads=threads)
        if name == ONNXRUNTIME:
            fed = feeds(runner.specs, inputs)
            return lambda: runner.session.run(None, fed)
        bound = tensors(runner.specs, inputs, runner.device)
        return lambda: (runner.run(bound), torch.cuda.synchronize())
    if source is None:
        raise UsageError(f"{name}: needs the floating-point model", hint="pass --source")
    opened, dtype = open_source(source), BASELINES[name]
    family = family_of(load_manifest(package)["source"]["config"]["_class_name"])
    # Past diffusers' own `to`, which warns of modules that stay in float32 even where there are none.
    model = nn.Module.to(opened.load(opened.model()), dtype)
    cast = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}

    @torch.no_grad()
    def run() -> torch.Tensor:
        return family.call(model, cast)

    return run


def timed(opened: dict[str, Run], runs: int, progress: Progress) -> dict[str, list[float]]:
    """Milliseconds of each run, taking turns; the first turn only warms up."""
    milliseconds: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(runs + 1):
        for name, run in opened.items():
            started = time.perf_counter()
            run()
            if turn:
                milliseconds[name].append(1000 * (time.perf_counter() - started))
        progress.advance()
    return milliseconds


def figures(milliseconds: list[float], batch: int) -> dict[str, float]:
    percentiles = {f"p{which}_ms": round(float(np.percentile(milliseconds, which)), 3) for which in PERCENTILES}
    return percentiles | {"samples_per_second": round(1000 * batch / float(np.median(milliseconds)), 2)}


def peak_bytes(package: Path, name: str, batch: int, threads: int | None, source: Path | None) -> int:
    """What opening a target and running it once adds at most to a process that has its libraries and inputs."""
    command = [sys.executable, "-m", "lrq_export.bench", str(package), name, str(batch), str(threads or 0)]
    command += [] if source is None else [str(source)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(finished.stdout.split()[-1])


def _measure_peak(package: Path, name: str, batch: int, threads: int, source: Path | None) -> int:
    inputs = inputs_of(package, batch)
    if threads:
        torch.set_num_threads(threads)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak so far, of importing libraries, is forgotten
    before = _resident("VmRSS")
    open_run(package, name, inputs, threads or None, source)()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
    with open(f"/proc/{os.getpid()}/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


if __name__ == "__main__":
    given = sys.argv[1:]
    source_path = Path(given[4]) if len(given) > 4 else None
    print(_measure_peak(Path(given[0]), given[1], int(given[2]), int(given[3]), source_path))
