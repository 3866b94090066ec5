"""Run ONNX Runtime's engine on torch tensors: where a CUDA provider is present, bound to them without host copies."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lrq_export.engine.session_settings import CUDA


class OnnxRuntimeRunner:
    """A session as a function of float32 torch tensors. Several threads may call it.

    `bind`: whether inputs and outputs are bound where they lie; default: if the session runs on CUDA.
    """

    def __init__(self, session: Any, *, bind: bool | None = None):
        self.session = session
        self._on_cuda = on_cuda = session.get_providers()[0] == CUDA
        # ONNX Runtime's CUDA provider takes the first GPU unless it is told another.
        self.device = torch.device("cuda", 0) if on_cuda else torch.device("cpu")
        self._bind = on_cuda if bind is None else bind
        self.input_names = [value.name for value in session.get_inputs()]

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output, on the runner's device; `inputs` by name, contiguous and there as well."""
        shape = self._output_shape(inputs) if self._bind else None
        if shape is None:
            (sample,) = self.session.run(None, {name: tensor.numpy(force=True) for name, tensor in inputs.items()})
            output = torch.from_numpy(sample)
            return output.to(self.device) if self._on_cuda else output
        kind, index = self.device.type, self.device.index or 0
        binding, sample = self.session.io_binding(), torch.empty(shape, device=self.device)
        for name, tensor in inputs.items():
            binding.bind_input(name, kind, index, np.float32, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output(self._output.name, kind, index, np.float32, shape, sample.data_ptr())
        if self._on_cuda:  # the session computes on a stream of its own, and waits for its end itself
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)
        return sample

    def close(self) -> None:
        """Free the session."""
        self.session = None

    @property
    def _output(self) -> Any:
        return self.session.get_outputs()[0]

    def _output_shape(self, inputs: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        """Sizes of the output, each fixed or an input's of the same name; None if one is neither."""
        known = {
            name: size
            for value in self.session.get_inputs()
            for name, size in zip(value.shape, inputs[value.name].shape, strict=True)
        }
        shape = tuple(known.get(size, size) for size in self._output.shape)
        return shape if all(isinstance(size, int) for size in shape) else None
