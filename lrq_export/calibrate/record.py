"""Record what a diffusers pipeline feeds its transformer, as a calibration file."""

import contextlib
import heapq
import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrq_export.calibrate.inputs import TIMESTEP, priority
from lrq_export.errors import InputError, UsageError
from lrq_export.models import FAMILIES
from lrq_export.models.base import flatten
from lrq_export.package import save_tensors_atomic

FORMAT = "lrq-export calibration"
SAME_SIZE = 'call the pipeline so that all sizes agree: padding="max_length" for texts, one height and width for images'

logger = logging.getLogger(__name__)


def record(pipeline: Any, prompts: Sequence[Any], path: Path, *, samples: int = 128, **call_arguments: Any) -> None:
    """Run `pipeline([prompt], **call_arguments)` for each prompt and write at most `samples` of the rows it denoises.

    Every tensor argument of the transformer's forward is kept under its name, in its own dtype, with the first axis
    counting samples; numbers are repeated for each sample. The rows are spread evenly over the whole run.
    Raises InputError when sizes or arguments differ between calls, UsageError when there is nothing to record.
    """
    if not prompts or samples < 1:
        raise UsageError(f"record: got {len(prompts)} prompts and samples={samples}, needed at least one of each")
    rows = SpreadRows(samples)
    with _watched(pipeline, rows), torch.no_grad():
        for prompt in prompts:
            pipeline([prompt], **call_arguments)
    rows.save(path, type(getattr(pipeline, "transformer", None)).__name__)


class SpreadRows:
    """Keeps at most `most` rows of a stream of unknown length, evenly spread over it; holds no others in memory."""

    def __init__(self, most: int):
        self.most, self.seen, self.calls = most, 0, 0
        self._shapes: dict[str, tuple[int, ...]] = {}  # of one row, by argument name
        self._dtypes: dict[str, torch.dtype] = {}
        self._steps: set[float] = set()
        # The row of highest priority number on top, ready to be dropped.
        self._kept: list[tuple[int, int, dict[str, torch.Tensor]]] = []

    def add(self, call: Mapping[str, torch.Tensor]) -> None:
        """Add every row of one call's arguments, each (rows, ...). Raises InputError when they differ from earlier."""
        if not call:
            raise InputError("record: a call of the transformer got no tensors, needed its inputs", hint=SAME_SIZE)
        self._check_same(call)
        self.calls += 1
        count = next(iter(call.values())).shape[0]
        if TIMESTEP in call:
            self._steps.update(call[TIMESTEP].flatten().tolist())
        for index in range(count):
            number, rank = self.seen, -priority(self.seen)
            self.seen += 1
            if len(self._kept) == self.most and rank < self._kept[0][0]:
                continue
            row = {name: tensor[index].detach().to("cpu", copy=True) for name, tensor in call.items()}
            (heapq.heappush if len(self._kept) < self.most else heapq.heapreplace)(self._kept, (rank, number, row))

    def save(self, path: Path, transformer: str) -> None:
        """Write the rows in the order they were seen. Raises UsageError when there were none."""
        if not self._kept:
            raise UsageError(
                "record: the pipeline never called its transformer, needed at least one call",
                hint="pass a pipeline whose denoiser is .transformer",
            )
        rows = [row for _, _, row in sorted(self._kept, key=lambda kept: kept[1])]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in self._shapes}
        metadata = {"format": FORMAT, "steps": str(len(self._steps)), "rows_seen": str(self.seen)}
        save_tensors_atomic(path, tensors, {**metadata, "transformer": transformer})

    def _check_same(self, call: Mapping[str, torch.Tensor]) -> None:
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in call.items()}
        if not self.calls:
            self._shapes, self._dtypes = shapes, {name: tensor.dtype for name, tensor in call.items()}
        where = f"record: call {self.calls + 1} of the transformer"
        for name in sorted(shapes.keys() ^ self._shapes.keys()):
            got, needed = ("no", "one") if name in self._shapes else ("a", "none")
            raise InputError(f"{where}: got {got} {name}, needed {needed} as in the calls before", hint=SAME_SIZE)
        for name, shape in shapes.items():
            if shape != self._shapes[name]:
                raise InputError(
                    f"{where}: {name}: got rows of shape {shape}, needed {self._shapes[name]} as in the calls before",
                    hint=SAME_SIZE,
                )
            if call[name].dtype != self._dtypes[name]:
                raise InputError(
                    f"{where}: {name}: got {call[name].dtype}, needed {self._dtypes[name]} as in the calls before",
                    hint="record every prompt with one dtype",
                )


def call_tensors(arguments: Mapping[str, Any], shared: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """A call's arguments by name -> its tensors by dotted name, each with the samples as first axis.

    The first tensor that has axes decides how many samples there are. Numbers and tensors of one value are repeated, as
    are the `shared` ones, which the model takes once for all samples; None, flags and anything else are left out.
    """
    flat = {
        name: value
        for name, value in flatten(arguments).items()
        if _is_number(value) or isinstance(value, torch.Tensor)
    }
    count = next((value.shape[0] for value in flat.values() if isinstance(value, torch.Tensor) and value.ndim > 1), 1)
    tensors = {}
    for name, value in flat.items():
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value)  # int64 or float32
        if value.ndim == 0 or (value.ndim == 1 and value.numel() == 1):
            value = value.reshape(1).expand(count)
        elif name in shared:
            value = value.expand(count, *value.shape)
        if value.shape[0] != count:
            logger.warning("record: left out %s of shape %s: not one per sample", name, tuple(value.shape))
            continue
        tensors[name] = value
    return tensors


def _shared_inputs(transformer: Any) -> list[str]:
    """Inputs without a samples axis, if the transformer is a package or of a family we know."""
    family = FAMILIES.get(type(transformer).__name__)
    specs = getattr(transformer, "specs", {}) if family is None else family.inputs(dict(transformer.config))
    return [name for name, spec in specs.items() if spec.shared]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextlib.contextmanager
def _watched(pipeline: Any, rows: SpreadRows) -> Iterator[None]:
    """Add the arguments of every call of `pipeline.transformer` to `rows` while the block runs."""
    transformer = getattr(pipeline, "transformer", None)
    if not callable(transformer):
        raise UsageError(
            f"record: got a {type(pipeline).__name__} without a .transformer, needed a pipeline that denoises with one",
            hint="pass a diffusers pipeline of a diffusion transformer",
        )
    is_module = isinstance(transformer, nn.Module)
    signature = inspect.signature(transformer.forward if is_module else transformer)
    shared = _shared_inputs(transformer)

    def observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        rows.add(call_tensors(_named(signature, args, kwargs), shared))

    if is_module:
        hook = transformer.register_forward_pre_hook(lambda _, args, kwargs: observe(args, kwargs), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
        return
    pipeline.transformer = _Watched(transformer, observe)
    try:
        yield
    finally:
        pipeline.transformer = transformer


class _Watched:
    """Stands in for a transformer that is no torch module, and so takes no hook; everything else is passed on."""

    def __init__(self, inner: Any, observe: Callable[[tuple[Any, ...], Mapping[str, Any]], None]):
        self._inner, self._observe = inner, observe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._observe(args, kwargs)
        return self._inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of one call by the forward's names; those taken by **kwargs stand under their own."""
    arguments: dict[str, Any] = {}
    for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments
