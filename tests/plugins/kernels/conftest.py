from contextlib import contextmanager

import kernel_machine
import pytest

OPS = ("rotate", "rotate_quantize", "decode", "dequantize", "linear", "linear_quantized")


@pytest.fixture(scope="session")
def emulated(shared_folder):
    return kernel_machine.Emulated(kernel_machine.build_emulated(shared_folder / "emulated-kernels"))


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request):
    """Where the kernels run: the CPU in the default tier, a GPU in that of `-m gpu`."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return kernel_machine.cuda_machine()


@pytest.fixture
def ops_on_cpu(emulated, monkeypatch):
    """torch.ops.lrq on CPU tensors, by the emulator: outside of tests the ops have no kernel for those."""
    from lrq_export import torch_ops

    @contextmanager
    def no_stream(tensor):
        yield None

    monkeypatch.setattr(torch_ops, "kernels", lambda: emulated.kernels)
    monkeypatch.setattr(torch_ops, "_current", no_stream)
    for name in OPS:
        op = getattr(torch_ops, name)
        op.register_kernel("cpu", op._init_fn)
