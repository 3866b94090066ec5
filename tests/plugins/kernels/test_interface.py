"""Every field of a call is checked on the host, before CUDA is asked for anything: hostile values and what they get."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest
from kernel_machine import KERNELS, Emulated

from lrq_export import kernels
from lrq_export.kernels import (
    STRUCTS,
    Format,
    KernelError,
    Kernels,
    Layout,
    Linear,
    Modulation,
    Prologue,
    Rotation,
    Status,
    Tactic,
    Tokens,
    Type,
    Weight,
)

HERE = 1 << 20  # an address that is aligned and that nobody may touch
ENUMS = {"LrqType": Type, "LrqPrologue": Prologue, "LrqFormat": Format, "LrqCodesLayout": Layout, "LrqTactic": Tactic}


@pytest.fixture(params=["emulated", "compiled"])
def library(request):
    """The emulated library, and the real one where it has been compiled: neither may get as far as a device."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated").kernels
    if kernels.ENVIRONMENT not in os.environ:
        pytest.skip(f"no compiled kernels: set {kernels.ENVIRONMENT}")
    return Kernels(Path(os.environ[kernels.ENVIRONMENT]))


def rotation(**changes) -> Rotation:
    fields = {
        "x": HERE, "signs": HERE, "y": HERE, "token_scales": HERE, "tokens": Tokens(2, 3), "channels": 256,
        "block": 128, "type": Type.HALF, "act_bits": 8,
    }  # fmt: skip
    return Rotation(**fields | changes)


def weight(**changes) -> Weight:
    fields = {
        "codes": HERE, "levels": HERE, "rows": 64, "cols": 256, "group_size": 256, "format": Format.TWIN_LOG,
        "layout": Layout.WORDS, "bits": 4, "fraction_bits": 4, "integer_bits": 6,
    }  # fmt: skip
    return Weight(**fields | changes)


def linear(of_weight=None, **changes) -> Linear:
    fields = {
        "x": HERE, "weight": weight(**of_weight or {}), "row_scales": HERE, "bias": HERE, "y": HERE,
        "tokens": Tokens(1, 5), "type": Type.BFLOAT16, "act_bits": 8,
    }  # fmt: skip
    return Linear(**fields | changes)


NORM = {"prologue": Prologue.LAYER_NORM, "scale": Modulation(HERE, 0, 256), "shift": Modulation(HERE, 0, 256)}
ROTATIONS = [
    ({"x": None}, Status.NULL_POINTER, "x is null"),
    ({"y": None}, Status.NULL_POINTER, "y is null"),
    ({"token_scales": None}, Status.NULL_POINTER, "tokenScales is null"),
    ({"x": HERE + 2}, Status.MISALIGNED, "x is .* multiple of 16"),
    ({"signs": HERE + 8}, Status.MISALIGNED, "signs"),
    ({"type": 3}, Status.BAD_FORMAT, "type is 3"),
    ({"type": -(2**31)}, Status.BAD_FORMAT, "type"),
    ({"prologue": 7}, Status.BAD_FORMAT, "prologue is 7"),
    ({"act_bits": 7}, Status.BAD_BITS, "actBits is 7"),
    ({"tokens": Tokens(-1, 3)}, Status.BAD_SIZE, "outerCount is -1"),
    ({"tokens": Tokens(2**31, 1)}, Status.BAD_SIZE, "outerCount"),
    ({"tokens": Tokens(2**20, 2**20)}, Status.BAD_SIZE, "outerCount . innerCount"),
    ({"tokens": Tokens(2**62, 4)}, Status.BAD_SIZE, "outerCount"),
    ({"channels": 0}, Status.BAD_SIZE, "channels is 0"),
    ({"channels": 2**63 - 1}, Status.BAD_SIZE, "channels"),
    ({"block": 0}, Status.BAD_BLOCK, "block is 0"),
    ({"block": 96, "channels": 256}, Status.BAD_BLOCK, "block 96 does not divide the 256 channels"),
    ({"block": 9, "channels": 9}, Status.BAD_BLOCK, "no Hadamard matrix"),
    ({"block": -128}, Status.BAD_BLOCK, "block is -128"),
    ({"scale": Modulation(HERE, 0, 0)}, Status.BAD_FORMAT, "not a norm"),
    (NORM | {"scale": Modulation(None, 0, 0)}, Status.NULL_POINTER, "scale is null"),
    (NORM | {"shift": Modulation(HERE + 1, 0, 0)}, Status.MISALIGNED, "shift"),
    (NORM | {"shift": Modulation(HERE, -1, 0)}, Status.BAD_SIZE, "strides -1 and 0"),
    (NORM | {"epsilon": -1.0}, Status.BAD_VALUE, "epsilon is -1"),
    (NORM | {"epsilon": float("nan")}, Status.BAD_VALUE, "epsilon is .*nan"),
]
WEIGHTS = [
    ({"rows": 0}, Status.BAD_SIZE, "rows is 0"),
    ({"cols": -(2**63)}, Status.BAD_SIZE, "cols"),
    ({"format": 3}, Status.BAD_FORMAT, "format is 3"),
    ({"layout": 2}, Status.BAD_FORMAT, "layout is 2"),
    ({"bits": 5}, Status.BAD_BITS, "bits is 5"),
    ({"bits": 8}, Status.BAD_BITS, "bits is 8"),
    ({"format": Format.INT8}, Status.BAD_BITS, "needed 8 and LRQ_STORAGE"),
    ({"group_size": 0}, Status.BAD_GROUP, "groupSize 0"),
    ({"group_size": 96}, Status.BAD_GROUP, "groupSize 96 does not divide the 256 columns"),
    ({"fraction_bits": 8}, Status.BAD_BITS, "fractionBits 8"),
    ({"integer_bits": -1}, Status.BAD_BITS, "integerBits -1"),
    ({"codes": None}, Status.NULL_POINTER, "codes is null"),
    ({"codes": HERE + 4}, Status.MISALIGNED, "codes"),
    ({"levels": None}, Status.NULL_POINTER, "levels is null"),
]
LINEARS = [
    ({"x": None}, Status.NULL_POINTER, "both null"),
    ({"quantized": HERE}, Status.NULL_POINTER, "both given"),
    ({"x": None, "quantized": HERE, "token_scales": None}, Status.NULL_POINTER, "tokenScales is null"),
    ({"x": None, "quantized": HERE, "token_scales": HERE, "block": 128}, Status.BAD_BLOCK, "come quantized"),
    ({"block": 100}, Status.BAD_BLOCK, "block"),
    ({"act_bits": 0}, Status.BAD_BITS, "actBits is 0"),
    ({"row_scales": None}, Status.NULL_POINTER, "rowScales is null"),
    ({"bias": HERE + 4}, Status.MISALIGNED, "bias"),
    ({"decoded": HERE + 1}, Status.MISALIGNED, "decoded"),
    ({"gate": Modulation(HERE, 0, 0)}, Status.NULL_POINTER, "residual is null"),
    ({"residual": HERE}, Status.NULL_POINTER, "gate is null"),
    ({"tactic": 8}, Status.BAD_FORMAT, "tactic is 8"),
    ({"tactic": -1}, Status.BAD_FORMAT, "tactic is -1"),
    ({"of_weight": {"cols": 131072, "group_size": 131072}}, Status.BAD_SIZE, "cols of a product is 131072"),
]


def named(value) -> str:
    """What a case is called: without addresses, which differ from process to process."""
    return re.sub(r" object at 0x\w+", "", str(value))


@pytest.mark.parametrize(("changes", "status", "text"), ROTATIONS, ids=named)
def test_a_hostile_rotation_is_refused(library, changes, status, text):
    with pytest.raises(KernelError, match=text) as error:
        library.rotate(rotation(**changes))
    assert error.value.status == status


@pytest.mark.parametrize(("changes", "status", "text"), WEIGHTS, ids=named)
def test_a_hostile_weight_is_refused(library, changes, status, text):
    calls = [
        lambda: library.decode(weight(**changes), HERE),
        lambda: library.dequantize(weight(**changes), HERE, HERE),
        lambda: library.linear(linear(changes), HERE, 1 << 40),
    ]
    for call in calls:
        with pytest.raises(KernelError, match=text) as error:
            call()
        assert error.value.status == status


@pytest.mark.parametrize(("changes", "status", "text"), LINEARS, ids=named)
def test_a_hostile_product_is_refused(library, changes, status, text):
    with pytest.raises(KernelError, match=text) as error:
        library.linear(linear(**changes), HERE, 1 << 40)
    assert error.value.status == status


def test_outputs_and_scales_must_be_there(library):
    for call in (
        lambda: library.decode(weight(), None),
        lambda: library.dequantize(weight(), None, HERE),
        lambda: library.dequantize(weight(), HERE, None),
        lambda: library.linear(linear(y=None), HERE, 1 << 40),
    ):
        with pytest.raises(KernelError, match="is null") as error:
            call()
        assert error.value.status == Status.NULL_POINTER


def test_workspace_depends_on_sizes_alone_and_grows_with_tokens(library):
    sizes = [library.workspace(linear(tokens=Tokens(1, n), x=HERE + 1)) for n in (0, 1, 64, 65, 4096)]
    assert sizes == sorted(sizes)
    assert all(size % 256 == 0 for size in sizes)
    assert sizes[-1] >= 4096 * 256 + 4096 * 4 + 64 * 256
    resident = library.workspace(linear(tokens=Tokens(1, 64), decoded=HERE))
    assert resident == 64 * 256 + 64 * 4
    quantized = {"x": None, "quantized": HERE, "token_scales": HERE}
    assert library.workspace(linear(tokens=Tokens(1, 64), decoded=HERE, **quantized)) == 0
    with pytest.raises(KernelError, match="actBits"):
        library.workspace(linear(act_bits=3))


def test_too_little_workspace_is_refused(library):
    needed = library.workspace(linear())
    for workspace, size, status in (
        (HERE, needed - 1, Status.BAD_WORKSPACE),
        (None, needed, Status.BAD_WORKSPACE),
        (HERE + 16, needed, Status.MISALIGNED),
    ):
        with pytest.raises(KernelError, match="workspace") as error:
            library.linear(linear(), workspace, size)
        assert error.value.status == status


def test_nothing_to_do_is_done_without_a_device(library):
    library.rotate(rotation(tokens=Tokens(0, 5), x=None, y=None))
    library.linear(linear(tokens=Tokens(3, 0), x=HERE), None, 0)


def test_without_a_device_a_call_says_so():
    import torch

    if kernels.ENVIRONMENT not in os.environ or torch.cuda.is_available():
        pytest.skip(f"needs compiled kernels (set {kernels.ENVIRONMENT}) and no GPU")
    library = Kernels(Path(os.environ[kernels.ENVIRONMENT]))
    assert library.architectures() == sorted(library.architectures()) != []
    for call in (
        lambda: library.rotate(rotation()),
        lambda: library.decode(weight(), HERE),
        lambda: library.linear(linear(), HERE, 1 << 40),
    ):
        with pytest.raises(KernelError, match="no CUDA device") as error:
            call()
        assert error.value.status == Status.CUDA_ERROR


def test_no_struct_at_all_is_refused(library):
    functions = library._library
    assert functions.lrqRotate(None, None) == Status.NULL_POINTER
    assert functions.lrqDecode(None, HERE, None) == Status.NULL_POINTER
    assert functions.lrqDequantize(None, HERE, HERE, None) == Status.NULL_POINTER
    assert functions.lrqLinear(None, HERE, 1 << 40, None) == Status.NULL_POINTER
    assert functions.lrqLinearWorkspace(None) == -1


def test_structs_and_enums_are_those_of_the_header(tmp_path):
    header = (KERNELS / "kernels.h").read_text()
    for name, enum in ENUMS.items():
        body = re.search(rf"typedef enum {name} \{{(.*?)\}} {name};", header, re.DOTALL)[1]
        values = {key.removeprefix("LRQ_"): int(number) for key, number in re.findall(r"(LRQ_\w+) = (\d+)", body)}
        values.pop("TACTICS", None)
        named = {"NONE" if key == "NO_PROLOGUE" else key: number for key, number in values.items()}
        assert named == {member.name: member.value for member in enum}
    program = tmp_path / "sizes.c"
    names = ("LrqTokens", "LrqModulation", "LrqRotation", "LrqWeight", "LrqLinear")
    prints = "\n".join(f'printf("%zu\\n", sizeof({name}));' for name in names)
    program.write_text(f'#include <stdio.h>\n#include "{KERNELS}/kernels.h"\nint main(void) {{ {prints} return 0; }}\n')
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", str(program), "-o", str(tmp_path / "sizes")], check=True)
    printed = subprocess.run([str(tmp_path / "sizes")], capture_output=True, text=True, check=True).stdout
    assert [int(line) for line in printed.split()] == [ctypes.sizeof(struct) for struct in STRUCTS]


def test_a_library_with_other_structs_is_refused(emulated, monkeypatch):
    class Grown(Weight):
        _fields_ = (("more", ctypes.c_int64),)

    monkeypatch.setattr(kernels, "STRUCTS", (*STRUCTS[:3], Grown, STRUCTS[4]))
    with pytest.raises(kernels.MissingError, match="structs"):
        Emulated(emulated.kernels.path)
