"""Run a package: `load(OUT)` is a drop-in for `pipe.transformer` of a diffusers pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrq_export.engine import onnxruntime as engine
from lrq_export.errors import InputError, MissingError, UsageError
from lrq_export.models import family_of
from lrq_export.models.base import SAMPLES, InputSpec, Sizes
from lrq_export.package import ONNXRUNTIME_ENGINE, load_manifest, verify_hashes


def load(package: str | Path, *, threads: int | None = None, check_hashes: bool = True) -> "PackagedTransformer":
    """Open a package that `lrq-export build` wrote. Raises InputError for a folder that is not one, or was edited."""
    package = Path(package)
    manifest = verify_hashes(package) if check_hashes else load_manifest(package)
    folder = package / ONNXRUNTIME_ENGINE
    if not (folder / engine.MODEL).is_file():
        raise MissingError(f"{folder}: the package holds no ONNX Runtime engine", hint="run lrq-export build again")
    return PackagedTransformer(engine.open_session(folder, threads), manifest["source"]["config"])


class PackagedTransformer:
    """Has the call signature, `.config`, `.dtype` and `return_dict` of the diffusers transformer it was built from.

    Takes and returns torch tensors; computes in float32. Several threads may call it at once.
    """

    def __init__(self, session, config: dict[str, Any]):
        from diffusers.configuration_utils import FrozenDict

        self.session, self.config = session, FrozenDict(config)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.specs = family_of(config["_class_name"]).inputs(config)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ):
        """Denoise once; arguments as in diffusers. Raises UsageError for arguments the package was not built with."""
        if attention_mask is not None or cross_attention_kwargs:
            raise UsageError("the package has no input for attention_mask or cross_attention_kwargs", hint="pass None")
        given = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "timestep": timestep,
            "encoder_attention_mask": encoder_attention_mask,
        }
        given |= {f"added_cond_kwargs.{key}": value for key, value in (added_cond_kwargs or {}).items()}
        (sample,) = self.session.run(None, feeds(self.specs, given))
        output = torch.from_numpy(sample).to(hidden_states.dtype)
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    forward = __call__

    def eval(self) -> "PackagedTransformer":
        return self

    def to(self, *_: Any, **__: Any) -> "PackagedTransformer":
        """Pipelines move their parts between devices; a session stays where it was opened."""
        return self


def feeds(specs: dict[str, InputSpec], given: dict[str, torch.Tensor | None]) -> dict[str, np.ndarray]:
    """Inputs of the graph as float32 arrays; an absent optional input is all ones.

    Raises InputError for one that is missing or of another rank or size.
    """
    sizes, arrays = Sizes(), {}
    for name, spec in specs.items():
        tensor = given.get(name)
        if tensor is None and not spec.optional:
            raise InputError(f"{name}: got None, needed a tensor of shape {spec}")
        if tensor is None:
            arrays[name] = np.ones([sizes[extent] if isinstance(extent, str) else extent for extent in spec.shape])
        else:
            if spec.shape == (SAMPLES,) and tensor.numel() == 1:  # one timestep for all samples
                tensor = tensor.reshape(1).expand(sizes[SAMPLES])
            sizes.admit(name, tuple(tensor.shape), spec)
            arrays[name] = tensor.detach().cpu().float().numpy()
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
