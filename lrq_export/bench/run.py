"""All contenders run turn by turn in one process, so that a slow moment of the machine hits them alike."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrq_export.bench.contenders import BASELINES, Contender, all_contenders, inputs_of
from lrq_export.bench.memory import Job
from lrq_export.errors import CheckFailed, LrqError
from lrq_export.layer_times import layer_times
from lrq_export.machine import describe_machine
from lrq_export.package import verify_hashes
from lrq_export.progress import Progress, Silent, stage
from lrq_export.runtime import ONNXRUNTIME, TARGETS, obstacle
from lrq_export.source import open_source_of

PERCENTILES = (50, 90, 99)
Row = dict[str, Any]
# Of a contender that did not run, as its note says.
NOT_MEASURED = {
    "device": None, **{f"p{which}_ms": None for which in PERCENTILES}, "samples_per_second": None, "peak_mib": None,
    "device_mib": None,
}  # fmt: skip


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
    """Rows of latency, throughput and memory, one for each batch and target that is here; baselines with `source`.

    A row has figures, or a `note` of why that target does not run that batch. With `layers`, also what each layer of
    each target takes, the slowest first. Inputs are those that the package keeps to be judged by. `speedup` is against
    the fastest baseline of the batch on the same device.
    Raises InputError for a bad package, or a source that the package was not built from; if no target ran at all, the
    error of the first.
    """
    progress = progress or Silent()
    manifest = verify_hashes(package)
    if source is not None:
        open_source_of(package, manifest, source)
    if threads is not None:
        torch.set_num_threads(threads)
    rows, timed_layers, timings = [], [], {}
    refused: list[LrqError] = []
    for batch in batches:
        inputs = inputs_of(package, batch)
        with stage(progress, f"batch {batch}", timings, runs):
            contenders, left_out = all_contenders(package, inputs, threads, source)
            milliseconds = timed(contenders, runs, progress)
        ran = [(contender.name, contender.device) for contender in contenders]
        del contenders  # their memory is free for what is measured next
        refused += left_out.values()
        for target, _ in ran if layers else ():
            found = layer_times(package, target, inputs, runs, threads) if target in TARGETS else []
            timed_layers += [{"batch": batch, "target": target} | each.row() for each in found]
        for (name, device), times in zip(ran, milliseconds, strict=True):
            job = Job(str(package), name, batch, threads, None if source is None else str(source), str(device))
            row = {"batch": batch, "target": name, "device": str(device), "note": None} | figures(times, batch)
            rows.append(row | job.in_its_own_process())
        for (name, device), error in left_out.items():
            where = None if device is None else str(device)
            rows.append({"batch": batch, "target": name} | NOT_MEASURED | {"device": where, "note": str(error)})
    if not any(_ran(row) for row in rows):
        raise refused[0] if refused else obstacle(package, ONNXRUNTIME)
    for row in rows:
        row["speedup"] = speedup(row, rows)
    return {
        "machine": describe_machine(), "threads": threads, "runs": runs, "rows": rows, "layers": timed_layers,
    }  # fmt: skip


def speedup(row: Row, rows: list[Row]) -> float | None:
    """How many times as fast a row is as the fastest baseline of its batch on its device; None without one."""
    alike = [other for other in rows if (other["batch"], other["device"]) == (row["batch"], row["device"])]
    baselines = [other["p50_ms"] for other in alike if other["target"] in BASELINES and other["p50_ms"] is not None]
    return round(min(baselines) / row["p50_ms"], 3) if baselines and row["p50_ms"] is not None else None


def _ran(row: Row) -> bool:
    return row["target"] in TARGETS and row["p50_ms"] is not None


def require_speedup(report: dict[str, Any], needed: float) -> None:
    """Raise CheckFailed for a batch whose fastest target is not `needed` times as fast as the fastest baseline.

    The fastest, not the one with the largest speedup: beside a GPU that disappoints, a processor may well shine.
    """
    if not report["rows"]:
        raise CheckFailed("no target of the package can run here: there is no speedup to judge")
    for batch in dict.fromkeys(row["batch"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["batch"] == batch]
        lacking = [row for row in rows if row["target"] in BASELINES and row["p50_ms"] is None]
        if lacking:  # it might have been the fastest
            raise CheckFailed(f"batch {batch}: a baseline did not run: {lacking[0]['note']}")
        best = min((row for row in rows if _ran(row)), key=lambda row: row["p50_ms"], default=None)
        if best is None or best["speedup"] is None:
            notes = "; ".join(row["note"] for row in rows if row["note"])
            raise CheckFailed(f"batch {batch}: there is no speedup to judge: {notes}")
        if best["speedup"] < needed:
            raise CheckFailed(
                f"batch {batch}: {best['target']} is {best['speedup']:.2f} times as fast as the fastest baseline on "
                f"{best['device']}, needed {needed:g}"
            )


def timed(contenders: list[Contender], runs: int, progress: Progress) -> list[list[float]]:
    """Milliseconds of each run of each of them, taking turns."""
    milliseconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(runs):
        for contender, times in zip(contenders, milliseconds, strict=True):
            started = time.perf_counter()
            contender.run()
            times.append(1000 * (time.perf_counter() - started))
        progress.advance()
    return milliseconds


def figures(milliseconds: list[float], batch: int) -> dict[str, float]:
    percentiles = {f"p{which}_ms": round(float(np.percentile(milliseconds, which)), 3) for which in PERCENTILES}
    return percentiles | {"samples_per_second": round(1000 * batch / float(np.median(milliseconds)), 2)}
