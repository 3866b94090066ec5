"""What stands for NVIDIA's library where engines are built."""

from pathlib import Path

import pytest

from lrq_export.doctor.system import System
from lrq_export.engine import run_obstacle, targets, tensorrt
from lrq_export.errors import MissingError


@pytest.fixture
def builder(monkeypatch, plan_of):
    """Stands for NVIDIA's library, which not every machine has: writes an engine, and keeps what it was asked for."""
    jobs = []

    def answer(job):
        jobs.append(job)
        plan = plan_of(job["target"])
        Path(job["engine"]).write_bytes(plan)
        return {"version": "1", "engine_bytes": len(plan), "layers": 3, "plugin_layers": len(job["plugin_nodes"])}

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
