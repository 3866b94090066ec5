import kernel_machine
import pytest


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # of all workers of pytest-xdist
    return kernel_machine.Emulated(kernel_machine.build_emulated(shared / "emulated-kernels"))


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request):
    """Where the kernels run: the CPU in the default tier, a GPU in that of `-m gpu`."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return kernel_machine.cuda_machine()
