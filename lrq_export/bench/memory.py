"""What a contender of `bench` needs in memory: what opening it and one run add to a process of its own.

    python -m lrq_export.bench.memory JOB        JOB is a `Job` as JSON; prints what `measure` returns, as JSON

On the host it is the most that was resident. On a GPU it is by how much the GPU's free memory shrank, whoever took it:
torch, ONNX Runtime and TensorRT each have an allocator of their own. They keep what they freed, so that after a run is
as much as within it; what other processes allocate meanwhile is counted, too. Not yet run on a GPU.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lrq_export.bench.contenders import inputs_of, open_contender


@dataclass(frozen=True)
class Job:
    """Which contender to measure, on how many samples."""

    package: str
    name: str
    batch: int
    threads: int | None
    source: str | None
    device: str

    def in_its_own_process(self) -> dict[str, float | str | None]:
        """`peak_mib` on the host, `device_mib` on a GPU, None on the CPU, and a `note` of why there is neither."""
        command = [sys.executable, "-m", __name__, json.dumps(asdict(self))]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            sizes = json.loads(lines[-1])
            return {key: None if size is None else round(size / 2**20, 1) for key, size in sizes.items()}
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        note = f"memory was not measured: the process that does ended with {done.returncode}: {said.strip()}"
        return {"peak_mib": None, "device_mib": None, "note": note}

    def measure(self) -> dict[str, int | None]:
        """Bytes, in this process."""
        inputs, device = inputs_of(Path(self.package), self.batch), torch.device(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        on_gpu = device.type == "cuda"
        free = free_on(device) if on_gpu else 0  # of a GPU that has the context which any use of it makes
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak so far, of importing libraries, is forgotten
        before = _resident("VmRSS")
        source = None if self.source is None else Path(self.source)
        contender = open_contender(Path(self.package), self.name, inputs, self.threads, source, device)
        contender.run()
        peak = max(0, _resident("VmHWM") - before)
        return {"peak_mib": peak, "device_mib": max(0, free - free_on(device)) if on_gpu else None}


def free_on(device: torch.device) -> int:
    """Bytes of a GPU that no process has."""
    return torch.cuda.mem_get_info(device)[0]


def _resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
    with open(f"/proc/{os.getpid()}/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


if __name__ == "__main__":
    print(json.dumps(Job(**json.loads(sys.argv[1])).measure()))
