"""Serve a package under load from this process: errors, lost requests, latency, memory; and what serving adds to a run.

    python tools/load_server.py PACKAGE [--clients 4] [--minutes 10] [--threads 1] [--queue 16]

Starts `lrq-export serve` in a process of its own. First one client takes turns with a bare session of the same package:
the difference of the medians is what a served request adds. Then the clients ask without a pause, every answer is
compared with the session's bit for bit, and the server's memory is read each second. Exits 1 when an answer is wrong,
late by a minute or not there, when the server counted other requests than were sent, when its memory grows, when it
does not end with 0, or when a request adds more than 5 ms.
"""

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton

from lrq_export.loading import load
from lrq_export.machine import describe_machine
from lrq_export.runtime import feeds
from lrq_export.verify.reference import Reference

CASES = 8  # requests of different content, so that answers that were swapped are seen
TURNS = 200
MOST_ADDED = 5.0  # ms
MOST_GROWTH = 8.0  # MiB, from the second fifth of the time to the last: 10 minutes of a small leak are far beyond it
NAME = "loaded"
Arrays = dict[str, np.ndarray]


@dataclass
class Findings:
    """What was seen; `faults` is what must not be."""

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def hold(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    session, cases = cases_of(options.package, options.threads, options.batch)
    findings = Findings({"machine": describe_machine(), "threads": options.threads, "batch": options.batch})
    command = [sys.executable, "-m", "lrq_export", "serve", str(options.package), "--port", "0", "--json"]
    command += ["--name", NAME, "--threads", str(options.threads), "--queue", str(options.queue)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = json.loads(server.stdout.readline())["url"].removeprefix("http://")
        sent = measure_overhead(findings, session, cases[0], address, options.turns)
        sent += measure_load(findings, cases, address, server.pid, options)
        check_counts(findings, address, sent)
        server.send_signal(signal.SIGTERM)
        findings.hold(server.wait(60) == 0, f"the server ended with {server.returncode}")
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    print(json.dumps(findings.figures, indent=2))
    for fault in findings.faults:
        print(f"FAULT: {fault}")
    return 1 if findings.faults else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of the server's session, and of the bare one")
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--any-overhead", action="store_true", help="report what a request adds, but do not judge it")
    return parser.parse_args(arguments)


def cases_of(package: Path, threads: int, batch: int) -> tuple[Any, list[tuple[Arrays, bytes]]]:
    """A bare session, and evaluation inputs of the package with what the session answers to each."""
    runner, recorded = load(package, target="onnxruntime", threads=threads), Reference.load(package).inputs
    rows = len(recorded["hidden_states"])
    cases = []
    for first in range(CASES):
        chosen = [(first + offset) % rows for offset in range(batch)]
        fed = feeds(runner.specs, {name: tensor[chosen] for name, tensor in recorded.items()})
        cases.append((fed, runner.session.run(None, fed)[0].tobytes()))
    return runner.session, cases


def as_inputs(fed: Arrays) -> list[triton.InferInput]:
    inputs = []
    for name, array in fed.items():
        inputs.append(triton.InferInput(name, array.shape, "FP32"))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def measure_overhead(findings: Findings, session: Any, case: tuple[Arrays, bytes], address: str, turns: int) -> int:
    """A bare run and a served request, turn by turn; returns how many requests that took."""
    fed, wanted = case
    times: dict[str, list[float]] = {"bare": [], "served": []}
    with triton.InferenceServerClient(address) as client:

        def served() -> bytes:
            return client.infer(NAME, as_inputs(fed)).as_numpy("sample").tobytes()

        runs = {"bare": lambda: session.run(None, fed)[0].tobytes(), "served": served}
        for turn in range(turns + 1):
            for name, run in runs.items():
                started = time.perf_counter()
                same = run() == wanted
                if turn:  # the first one warms up
                    times[name].append(1000 * (time.perf_counter() - started))
                findings.hold(same, f"{name}: an answer differs from the session's")
    percentiles = {name: np.percentile(each, (50, 10)).round(2).tolist() for name, each in times.items()}
    added, added_undisturbed = np.subtract(percentiles["served"], percentiles["bare"]).round(2).tolist()
    findings.figures["one client"] = {
        "turns": turns, "ms: median, 10th percentile": percentiles, "added ms": added,
        "added ms at the 10th percentile": added_undisturbed,  # what is left of it where others leave the machine alone
    }  # fmt: skip
    return turns + 1


def measure_load(
    findings: Findings, cases: list[tuple[Arrays, bytes]], address: str, pid: int, options: argparse.Namespace
) -> int:
    """All clients at once until the time is over; returns how many requests they sent."""
    until = time.monotonic() + 60 * options.minutes
    milliseconds: list[float] = []
    outcomes: Counter[str] = Counter()

    def ask(index: int) -> None:
        with triton.InferenceServerClient(address) as client:
            for turn in range(sys.maxsize):
                if time.monotonic() >= until:
                    return
                fed, wanted = cases[(index + turn) % len(cases)]
                started = time.perf_counter()
                try:
                    same = client.infer(NAME, as_inputs(fed)).as_numpy("sample").tobytes() == wanted
                    outcomes["right" if same else "wrong"] += 1
                    milliseconds.append(1000 * (time.perf_counter() - started))
                except triton.InferenceServerException as error:
                    outcomes[f"refused: {error}"] += 1
                    time.sleep(0.05)
                except Exception as error:  # no answer at all: the connection broke, or a minute went by
                    outcomes[f"lost: {type(error).__name__} {error}"] += 1

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(options.clients)]
    for thread in threads:
        thread.start()
    resident = []
    while any(thread.is_alive() for thread in threads):
        resident.append(resident_mebibytes(pid))
        time.sleep(min(1.0, max(0.01, 60 * options.minutes / 50)))
    for thread in threads:
        thread.join()
    report_load(findings, outcomes, milliseconds, resident, options)
    if not options.any_overhead:
        added = findings.figures["one client"]["added ms"]
        findings.hold(added <= MOST_ADDED, f"a served request adds {added} ms, needed at most {MOST_ADDED}")
    return sum(outcomes.values())


def report_load(
    findings: Findings, outcomes: Counter[str], milliseconds: list[float], resident: list[float], options: Any
) -> None:
    fifth = max(1, len(resident) // 5)
    growth = float(np.median(resident[-fifth:]) - np.median(resident[fifth : 2 * fifth] or resident))
    percentiles = np.percentile(milliseconds or [np.nan], (50, 90, 99, 100))
    findings.figures["load"] = {
        "clients": options.clients, "minutes": options.minutes, "requests": sum(outcomes.values()),
        "outcomes": dict(outcomes),
        "ms": dict(zip(("p50", "p90", "p99", "max"), (round(float(each), 2) for each in percentiles), strict=True)),
        "server MiB": [round(float(np.median(part)), 1) for part in np.array_split(resident, 10) if len(part)],
        "growth MiB": round(growth, 2),
    }  # fmt: skip
    for outcome, count in outcomes.items():
        findings.hold(outcome == "right", f"{count} answers were {outcome}")
    findings.hold(outcomes["right"] > 0, "nothing was answered")
    findings.hold(growth <= MOST_GROWTH, f"the server grew by {growth:.1f} MiB, needed at most {MOST_GROWTH:g}")


def check_counts(findings: Findings, address: str, sent: int) -> None:
    """What the server says it took is what was sent."""
    page = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    counted = int(float(lines["lrq_requests_total"]))
    findings.figures["counted by the server"] = counted
    findings.hold(counted == sent, f"the server counted {counted} requests, but {sent} were sent")


def resident_mebibytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
