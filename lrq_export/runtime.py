"""Run a package: `load(OUT)` is a drop-in for `pipe.transformer` of a diffusers pipeline."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrq_export.admit import admit
from lrq_export.engine import onnxruntime as engine
from lrq_export.engine.session_settings import SESSION
from lrq_export.errors import InputError, MissingError, UsageError
from lrq_export.models import family_of
from lrq_export.models.base import SAMPLES, InputSpec, ModelFamily, Sizes, flatten, nest
from lrq_export.package import MANIFEST, ONNXRUNTIME_ENGINE


def load(package: str | Path, *, threads: int | None = None) -> "PackagedTransformer":
    """Open a package that `lrq-export build` wrote. Raises InputError for a folder that is not one, or was edited.

    There is no way around the checks (`admit`); a package that did not change since is not hashed again.
    """
    package = Path(package)
    manifest = admit(package)
    folder = package / ONNXRUNTIME_ENGINE
    if not ((folder / engine.MODEL).is_file() and (folder / SESSION).is_file()):
        raise MissingError(f"{folder}: the package holds no ONNX Runtime engine", hint="run lrq-export build again")
    config = manifest["source"]["config"]
    try:
        family_of(config["_class_name"], str(package / MANIFEST)).inputs(config)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{package / MANIFEST}: source: not a config of {config['_class_name']}: {error!r}",
            hint="build the package again",
        ) from error
    return PackagedTransformer(engine.open_session(folder, threads), config)


class PackagedTransformer:
    """Has the call signature, `.config`, `.dtype` and `return_dict` of the diffusers transformer it was built from.

    Takes and returns torch tensors; computes in float32. Several threads may call it at once.
    """

    def __init__(self, session, config: dict[str, Any]):
        from diffusers.configuration_utils import FrozenDict

        self.session, self.config = session, FrozenDict(config)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        family = family_of(config["_class_name"])
        self.specs, self.__signature__ = family.inputs(config), _signature(family)

    def __call__(self, *positional: Any, **named: Any):
        """Denoise once; arguments as in diffusers. Raises UsageError for arguments the package was not built with."""
        arguments = self.__signature__.bind(*positional, **named).arguments
        return_dict, given = arguments.pop("return_dict", True), dict(flatten(arguments))
        # diffusers, too, ignores size conditions that the model has no use for.
        known = nest(self.specs).keys() | {"added_cond_kwargs"}
        for name, value in given.items():
            if value is not None and name.partition(".")[0] not in known:
                raise UsageError(f"the package has no input for {name}", hint="pass None")
        (sample,) = self.session.run(None, feeds(self.specs, given))
        output = torch.from_numpy(sample).to(given["hidden_states"].dtype)
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    forward = __call__

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
    """Inputs of the graph as float32 arrays; an absent optional input is all ones.

    Raises InputError for one that is missing or of another rank or size, or holds labels of no class.
    """
    sizes, arrays = Sizes(), {}
    for name, spec in specs.items():
        tensor = given.get(name)
        if tensor is None and not spec.optional:
            raise InputError(f"{name}: got None, needed a tensor of shape {spec}")
        if tensor is None:
            arrays[name] = np.ones([sizes[extent] if isinstance(extent, str) else extent for extent in spec.shape])
        else:
            if spec.shape == (SAMPLES,) and tensor.numel() == 1:  # one timestep or label for all samples
                tensor = tensor.reshape(1).expand(sizes[SAMPLES])
            elif spec.shared and tensor.ndim == len(spec.shape) - 1:
                tensor = tensor.expand(sizes[SAMPLES], *tensor.shape)
            sizes.admit(name, tuple(tensor.shape), spec)
            spec.check_labels(name, tensor)
            arrays[name] = tensor.detach().cpu().float().numpy()
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
