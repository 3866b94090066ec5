"""What stands for NVIDIA's library where engines are built."""

from pathlib import Path

import pytest

from lrq_export.admit import ENGINE_STARTS
from lrq_export.doctor.system import System
from lrq_export.engine import run_obstacle, targets, tensorrt
from lrq_export.errors import MissingError


@pytest.fixture
def builder(monkeypatch):
    """Stands for NVIDIA's library, which not every machine has: writes an engine, and keeps what it was asked for."""
    jobs = []

    def answer(job):
        jobs.append(job)
        start, _ = ENGINE_STARTS[job["target"]]
        Path(job["engine"]).write_bytes(start + b"...")
        return {"version": "1", "engine_bytes": 7, "layers": 3, "plugin_layers": len(job["plugin_nodes"])}

    monkeypatch.setattr(tensorrt, "obstacle", lambda target: None)
    monkeypatch.setattr(tensorrt, "find_library", lambda: None)
    monkeypatch.setattr(tensorrt, "run_worker", answer)
    for module in (targets, run_obstacle):
        monkeypatch.setattr(module, "installed_tensorrt", lambda *_: "1")
    monkeypatch.setattr(System, "gpu", lambda system: "H100")
    return jobs


@pytest.fixture
def cannot_build(monkeypatch):
    """From here on this machine has no GPU."""

    def lose():
        lack = MissingError("tensorrt: this machine has no CUDA GPU", hint="build the engine where it will run")
        monkeypatch.setattr(tensorrt, "obstacle", lambda target: lack)

    return lose
