"""What machine this is: a timing means nothing without it. And what else decides the bytes of a result: versions."""

import os
from importlib.metadata import version
from typing import Any

import torch

from lrq_export import __version__
from lrq_export.doctor.system import Driver, System

LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime", "safetensors", "numpy")


def libraries() -> dict[str, str]:
    """Versions of what a result is computed with."""
    return {name: version(name) for name in LIBRARIES}


def versions() -> dict[str, str]:
    """All that can change a result besides its inputs.

    Sums of floats depend on how many threads share them: another number is another build, not a resumed one.
    """
    return libraries() | {"lrq-export": __version__, "threads": str(torch.get_num_threads())}


def describe_machine() -> dict[str, Any]:
    """The processor and, where there are any, the GPUs with their driver."""
    return describe_processor() | describe_gpus(System())


def describe_gpus(system: System) -> dict[str, Any]:
    """Name and compute capability of each GPU, and the driver's release and CUDA; nothing where there is no GPU."""
    driver = system.driver()
    if not isinstance(driver, Driver) or not driver.gpus:
        return {}
    told = system.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    release = next(iter(told.split()), "of unknown release")
    gpus = [{"name": name, "compute_capability": f"{major}.{minor}"} for name, (major, minor) in driver.gpus]
    return {"gpus": gpus, "driver": f"{release}, CUDA {driver.cuda[0]}.{driver.cuda[1]}"}


def describe_processor() -> dict[str, Any]:
    """The processor and the features that decide how fast integer products are, and how floats are summed."""
    processor, features = "unknown", []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        processor = fields.get("model name", processor)
        known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")
        features = [name for name in known if name in fields.get("flags", "").split()]
    return {"processor": processor, "cores": os.cpu_count(), "features": features}
