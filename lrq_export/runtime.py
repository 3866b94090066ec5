"""Run a package: what `lrq_export.load(OUT)` gives is a drop-in for `pipe.transformer` of a diffusers pipeline."""

import inspect
import logging
import math
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lrq_export.engine import onnxruntime as engine
from lrq_export.engine.built import FOLDERS
from lrq_export.engine.gate import Gate
from lrq_export.engine.onnxruntime_runner import OnnxRuntimeRunner
from lrq_export.engine.run_obstacle import run_obstacle
from lrq_export.engine.session_settings import SESSION
from lrq_export.errors import InputError, LrqError, MissingError, UsageError
from lrq_export.loading import AUTO
from lrq_export.models import family_of, model_inputs
from lrq_export.models.base import SAMPLES, InputSpec, ModelFamily, Sizes, flatten, nest
from lrq_export.package import MANIFEST, ONNXRUNTIME_ENGINE

_LOG = logging.getLogger(__name__)
MOST_PLANS = 64
ONNXRUNTIME = "onnxruntime"
CPU_DEVICE = torch.device("cpu")
TARGETS = (*FOLDERS, ONNXRUNTIME)  # the first that can run here is the one that is wanted


class Runner(Protocol):
    """An engine that is open, on one device."""

    device: torch.device
    input_names: Sequence[str]

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor: ...

    def close(self) -> None: ...


def open_admitted(package: Path, manifest: dict[str, Any], target: str, threads: int | None) -> "PackagedTransformer":
    """`lrq_export.load` of a package that was admitted, with its manifest."""
    if target not in (AUTO, *TARGETS):
        raise UsageError(f"target: got {target!r}, needed one of {', '.join((AUTO, *TARGETS))}")
    config = manifest["source"]["config"]
    specs = model_inputs(config, str(package / MANIFEST))
    chosen, runner = _open_first(package, TARGETS if target == AUTO else (target,), threads)
    if set(runner.input_names) != specs.keys():
        raise InputError(
            f"{package}: its {chosen} engine takes {', '.join(runner.input_names)}; the model of its manifest takes "
            f"{', '.join(specs)}",
            hint="build the package again",
        )
    return PackagedTransformer(runner, config, chosen)


def _open_first(package: Path, targets: Sequence[str], threads: int | None) -> tuple[str, Runner]:
    """The first of `targets` that opens here, and its engine. Raises what the last one lacks if none does."""
    *first, last = targets
    for target in first:
        try:
            return target, _open(package, target, threads)
        except (MissingError, InputError) as error:  # the latter: a plan that its library does not take
            _LOG.info("%s is not used: %s", target, error)
    return last, _open(package, last, threads)


def _open(package: Path, target: str, threads: int | None) -> Runner:
    lack = obstacle(package, target)
    if lack is not None:
        raise lack
    return open_runner(package, target, threads)


def obstacle(package: Path, target: str) -> LrqError | None:
    """Why a target of an admitted package cannot be loaded here; None if nothing is known to be in the way."""
    if target != ONNXRUNTIME:
        return run_obstacle(package, target)
    folder = package / ONNXRUNTIME_ENGINE
    if (folder / engine.MODEL).is_file() and (folder / SESSION).is_file():
        return None
    return MissingError(f"{folder}: the package holds no ONNX Runtime engine", hint="run lrq-export build again")


def open_runner(package: Path, target: str, threads: int | None = None) -> Runner:
    """The engine of a target of an admitted package. Raises MissingError for one too large for the GPU's memory."""
    if target == ONNXRUNTIME:
        return OnnxRuntimeRunner(engine.open_session(package / ONNXRUNTIME_ENGINE, threads))
    from lrq_export.engine.tensorrt_runner import TensorRtRunner

    try:
        return TensorRtRunner(package / FOLDERS[target], target)
    except torch.OutOfMemoryError as error:
        raise MissingError(
            f"{package / FOLDERS[target]}: the GPU has too little free memory: {str(error).partition('. ')[0]}",
            hint="end what else runs there, or build the engine with engine.weight_streaming=true or smaller profiles",
        ) from error


class PackagedTransformer:
    """Has the call signature, `.config`, `.dtype` and `return_dict` of the diffusers transformer it was built from.

    Takes and returns torch tensors; computes in float32 on `.device` with the engine of `.target`, and the answer lies
    where the latents do. Several threads may call it at once. `close`, or a `with` block, frees the engine.
    """

    def __init__(self, runner: Runner, config: dict[str, Any], target: str = ONNXRUNTIME):
        from diffusers.configuration_utils import FrozenDict

        self.target = target
        self.config, self.dtype, self.device = FrozenDict(config), torch.float32, runner.device
        family = family_of(config["_class_name"])
        self.specs, self.__signature__ = family.inputs(config), _signature(family)
        # diffusers, too, ignores size conditions that the model has no use for.
        self._known = nest(self.specs).keys() | {"added_cond_kwargs"}
        self._runner, self._gate = runner, Gate("the transformer")
        self._names = dict.fromkeys(self.__signature__.parameters)
        self._plans: dict[Shapes, InputPlan] = {}

    @property
    def session(self):
        """The `onnxruntime.InferenceSession`; engines of other targets have none."""
        with self._gate:
            return self._runner.session

    def run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the engine answers to its own inputs, as `tensors` makes them. Raises UsageError once it is closed."""
        with self._gate:
            return self._runner(inputs)

    def close(self) -> None:
        """Free the engine, after the calls that run; later calls raise UsageError. A second time does nothing."""
        if self._gate.close():
            self._runner.close()

    def __enter__(self) -> "PackagedTransformer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(self, *positional: Any, **named: Any):
        """Denoise once; arguments as in diffusers. Raises UsageError for arguments the package was not built with."""
        arguments = self._arguments(positional, named)
        return_dict, given = arguments.pop("return_dict", True), flatten(arguments)
        if not self._known.issuperset(arguments):
            self._refuse_unknown(given)
        inputs, latents = self._inputs(given), given["hidden_states"]
        alike = latents.device == self.device and latents.dtype == self.dtype  # behind the run it costs more to ask
        sample = self.run(inputs)
        output = sample if alike else sample.to(latents.device, latents.dtype)
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    forward = __call__

    def _refuse_unknown(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if value is not None and name.partition(".")[0] not in self._known:
                raise UsageError(f"the package has no input for {name}", hint="pass None")

    def _inputs(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """`tensors`, by the plan of an earlier call with these shapes: they stay the same over a loop."""
        shapes = shapes_of(self.specs, given)
        plan = self._plans.get(shapes)
        if plan is None:
            plan = InputPlan.of(self.specs, shapes, self.device)
            if len(self._plans) >= MOST_PLANS:  # threads may pass it
                self._plans.clear()
            self._plans[shapes] = plan
        return plan.inputs(given)

    def _arguments(self, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """By name. `Signature.bind` takes its time, and is asked only to raise what Python does for wrong arguments."""
        names, arguments = self._names, dict(zip(self._names, positional, strict=False)) | named
        once = len(arguments) == len(positional) + len(named)
        if once and arguments.keys() <= names.keys() and next(iter(names)) in arguments:
            return arguments
        return self.__signature__.bind(*positional, **named).arguments

    def cache_context(self, name: str, **_: Any) -> AbstractContextManager[None]:
        """Pipelines name each call for diffusers' caches, which a session has none of."""
        return nullcontext()

    def eval(self) -> "PackagedTransformer":
        return self

    def to(self, *_: Any, **__: Any) -> "PackagedTransformer":
        """Pipelines move their parts between devices; a session stays where it was opened."""
        return self


def _signature(family: ModelFamily) -> inspect.Signature:
    """What `inspect.signature` gives of the family's forward: only the first argument has no default."""
    kind, first = inspect.Parameter.POSITIONAL_OR_KEYWORD, family.arguments[0]
    rest = [inspect.Parameter(name, kind, default=None) for name in family.arguments[1:]]
    return inspect.Signature(
        [inspect.Parameter(first, kind), *rest, inspect.Parameter("return_dict", kind, default=True)]
    )


def feeds(specs: dict[str, InputSpec], given: dict[str, torch.Tensor | None]) -> dict[str, np.ndarray]:
    """`tensors` as arrays."""
    return {name: tensor.numpy() for name, tensor in tensors(specs, given).items()}


def tensors(
    specs: dict[str, InputSpec], given: dict[str, torch.Tensor | None], device: torch.device = CPU_DEVICE
) -> dict[str, torch.Tensor]:
    """Inputs of the graph as contiguous float32 tensors on a device; an absent optional input is all ones.

    Raises InputError for one that is missing or of another rank or size, or holds labels of no class.
    """
    return InputPlan.of(specs, shapes_of(specs, given), device).inputs(given)


Shapes = tuple[tuple[int, ...] | None, ...]  # of every input as it is given; None: it is absent


def shapes_of(specs: dict[str, InputSpec], given: dict[str, torch.Tensor | None]) -> Shapes:
    """Raises InputError for what is no tensor."""
    return tuple([None if (tensor := given.get(name)) is None else _shape(name, tensor) for name in specs])


def _shape(name: str, tensor: Any) -> tuple[int, ...]:
    if isinstance(tensor, torch.Tensor):
        return tensor.shape
    got = f"{tensor!r}" if isinstance(tensor, int | float) else f"a {type(tensor).__name__}"
    raise InputError(f"{name}: got {got}, needed a torch.Tensor", hint=f"pass torch.as_tensor({name})")


@dataclass(frozen=True)
class InputPlan:
    """What arguments of certain shapes become, whatever their values, dtypes and devices. Threads may share one."""

    device: torch.device
    present: dict[str, InputSpec] = field(default_factory=dict)
    expanded: dict[str, tuple[int, ...]] = field(default_factory=dict)  # sizes of what is given once for all samples
    absent: dict[str, torch.Tensor] = field(default_factory=dict)  # all ones; engines read them, no caller gets them
    labels: dict[str, "CheckedLabels"] = field(default_factory=dict)

    @classmethod
    def of(cls, specs: dict[str, InputSpec], shapes: Shapes, device: torch.device) -> "InputPlan":
        """Raises InputError for an input that is missing or of another rank or size."""
        sizes, plan = Sizes(), cls(device)
        for (name, spec), shape in zip(specs.items(), shapes, strict=True):
            if shape is not None:
                needed = _expanded(spec, tuple(shape), sizes)
                sizes.admit(name, needed, spec)
                plan.present[name] = spec
                if spec.classes is not None:
                    plan.labels[name] = CheckedLabels(spec)
                if needed != shape:
                    plan.expanded[name] = needed
            elif spec.optional:
                extents = [sizes[extent] if isinstance(extent, str) else extent for extent in spec.shape]
                plan.absent[name] = torch.ones(extents, dtype=torch.float32, device=device)
            else:
                raise InputError(f"{name}: got None, needed a tensor of shape {spec}")
        if plan.absent and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # later calls may come on other streams
        return plan

    def inputs(self, given: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """What is given in these shapes, as the graph takes it. Raises InputError for labels of no class."""
        for name, labels in self.labels.items():
            labels.check(name, given[name])
        made = dict(self.absent)
        for name in self.present:
            tensor, needed = given[name], self.expanded.get(name)
            if needed is not None:
                tensor = (tensor.flatten() if len(needed) == 1 else tensor).expand(needed)
            made[name] = as_input(tensor, self.device)
        return made


class CheckedLabels:
    """Labels on a GPU that were found to be classes: a loop over timesteps that gives the same waits for them once."""

    def __init__(self, spec: InputSpec):
        self._spec, self._last = spec, (lambda: None, -1)

    def check(self, name: str, labels: torch.Tensor) -> None:
        """Raise InputError for a label of no class."""
        if not labels.is_cuda or labels.is_inference():  # nothing to wait for; no count of writes
            self._spec.check_labels(name, labels)
            return
        known, version = self._last
        if known() is not labels or version != labels._version:
            self._spec.check_labels(name, labels)
            self._last = weakref.ref(labels), labels._version


def _expanded(spec: InputSpec, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
    """The shape of what is given once for all samples, as for all of them; another shape as it is."""
    if spec.shape == (SAMPLES,) and math.prod(shape) == 1:  # one timestep or label
        return (sizes[SAMPLES],)
    if spec.shared and len(shape) == len(spec.shape) - 1:
        return (sizes[SAMPLES], *shape)
    return shape


def as_input(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the right sizes as the graph takes it."""
    # Behind a run, whose weights fill the caches, every call of torch that can be spared counts.
    ready = tensor.dtype == torch.float32 and tensor.device == device and not tensor.requires_grad
    tensor = tensor if ready else tensor.detach().to(device, torch.float32)
    return tensor if tensor.is_contiguous() else tensor.contiguous()
