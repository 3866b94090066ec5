"""What `bench` times: a package's targets and, on the devices that those run on, the model that it was made from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors
from torch import nn

from lrq_export.doctor.system import System
from lrq_export.engine.built import FOLDERS, built_engine
from lrq_export.errors import CheckFailed, LrqError, MissingError
from lrq_export.loading import load
from lrq_export.models import family_of
from lrq_export.package import load_manifest
from lrq_export.runtime import CPU_DEVICE, TARGETS, feeds, obstacle, tensors
from lrq_export.source import open_source
from lrq_export.verify.reference import Reference

BASELINES = {"torch fp32": torch.float32, "torch bf16": torch.bfloat16}
LIBRARY_ERRORS = (RuntimeError, onnxruntime_errors.Fail, onnxruntime_errors.RuntimeException)
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """A target or baseline that is open on a device. `run` returns when its result is there."""

    name: str
    device: torch.device
    run: Callable[[], Any]


def inputs_of(package: Path, batch: int) -> Inputs:
    """`batch` rows of the package's evaluation inputs, repeated where there are fewer.

    Raises MissingError if there is no memory for them.
    """
    recorded = Reference.load(package).inputs
    needed, memory = batch * sum(tensor[:1].nbytes for tensor in recorded.values()), System().memory()
    if memory is not None and needed > memory[1]:
        raise MissingError(
            f"batch {batch}: its inputs take {needed / 2**30:.1f} GiB, {memory[1] / 2**30:.1f} are free",
            hint="try a smaller batch",
        )
    rows = torch.arange(batch) % len(recorded["hidden_states"])
    return {name: tensor[rows] for name, tensor in recorded.items()}


def all_contenders(
    package: Path, inputs: Inputs, threads: int | None, source: Path | None
) -> tuple[list[Contender], dict[tuple[str, torch.device | None], LrqError]]:
    """All that can run these inputs here, each warmed up by a run, and why each other one does not; by name and device.

    Baselines, of which there are some with a `source` alone, are on each device that a target runs on.
    """
    opened, refused, lacking = [], {}, {}

    def attempt(name: str, device: torch.device | None = None) -> None:
        try:
            contender = open_contender(package, name, inputs, threads, source, device)
            contender.run()
        except LrqError as error:
            refused[name, device] = error
        except torch.OutOfMemoryError as error:
            lack = MissingError(f"{name}: the GPU has too little memory: {error}", hint="try a smaller batch")
            refused[name, device] = lack
        except LIBRARY_ERRORS as error:  # of torch and TensorRT; ONNX Runtime's
            refused[name, device] = CheckFailed(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            opened.append(contender)

    for target in TARGETS:
        lack = obstacle(package, target)
        if lack is None:
            attempt(target)
        elif target in FOLDERS and built_engine(package, target) is not None:
            lacking[target, None] = lack  # an engine that is there and cannot run here
    for device in dict.fromkeys(target.device for target in opened):
        for name in BASELINES if source is not None else ():
            attempt(name, device)
    return opened, refused | lacking


def open_contender(
    package: Path, name: str, inputs: Inputs, threads: int | None, source: Path | None, device: torch.device | None
) -> Contender:
    """One of them; baselines need `source` and `device`, a target chooses its device itself."""
    if name in TARGETS:
        return _open_target(package, name, inputs, threads)
    return _open_baseline(package, name, inputs, source, device)


def _open_target(package: Path, target: str, inputs: Inputs, threads: int | None) -> Contender:
    """Its inputs lie where it runs, as those of the baselines do."""
    runner = load(package, target=target, threads=threads)
    device = runner.device
    if device == CPU_DEVICE:
        fed, session = feeds(runner.specs, inputs), runner.session
        return Contender(target, device, lambda: session.run(None, fed))
    bound = tensors(runner.specs, inputs, device)
    return Contender(target, device, until_done(lambda: runner.run(bound), device))


def _open_baseline(package: Path, name: str, inputs: Inputs, source: Path, device: torch.device) -> Contender:
    opened, dtype = open_source(source), BASELINES[name]
    family = family_of(load_manifest(package)["source"]["config"]["_class_name"])
    # Past diffusers' own `to`, which warns of modules that stay in float32 even where there are none.
    model = nn.Module.to(opened.load(opened.model()), device, dtype)
    cast = {key: tensor.to(device, dtype if tensor.is_floating_point() else None) for key, tensor in inputs.items()}

    @torch.no_grad()
    def run() -> torch.Tensor:
        return family.call(model, cast)

    return Contender(name, device, until_done(run, device))


def until_done(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run`, until a GPU has done what a call of it only queues there."""
    if device.type != "cuda":
        return run

    def wait() -> Any:
        result = run()
        torch.cuda.synchronize(device)
        return result

    return wait
