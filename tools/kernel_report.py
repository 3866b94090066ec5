"""What the compiler made of the CUDA kernels: registers, spills and the instructions that matter, from their SASS.

    python tools/kernel_report.py BUILD_FOLDER [--arch sm_90a] [--summary | --rotations]

BUILD_FOLDER is where CMake built `plugins`. Prints a table of every kernel in the objects found there and exits 1 if
one breaks a rule: a loop that loads or stores spilled registers, a rotation, which is no loop, that does so often, a
Hopper product without IGMMA, another without IMMA, a decode without PRMT, vectors that are not 16 bytes wide.
--rotations counts the instructions of the rotations' longest way for each channel. Needs cuobjdump and nvdisasm: of the
CUDA toolkit, or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SPILLS = ("LDL", "STL")
SHOWN = ("IGMMA", "IMMA", "PRMT", "SHFL", "LDG.E.128", "STG.E.128", "UTMALDG")
# What a kernel must contain, by the start of its name.
RULES = {
    "launch_wgmma": ("IGMMA", "UTMALDG"),
    "launch_imma": ("IMMA",),
    "multiplyPacked": ("IMMA", "PRMT"),
    "decodeRuns": ("PRMT", "STG.E.128"),
    "rotateRuns": ("SHFL", "LDG.E.128", "STG.E.128"),
    "rotateColumns": ("STS", "LDS.128", "STG.E.128"),
}
# Of a division for each element: the way of tokens whose scale is beyond 2^60, which no count is to be of.
RARE = ("F2I", "FRND")
MOST_SPILLS = 40  # of a rotation's thousands of instructions, which run once each
RUN = 16  # channels, in plugins/kernels/token_runs.h


@dataclass
class Instruction:
    """`target` is where a branch goes, and whether there is a way past it."""

    address: int
    opcode: str
    target: int | None = None
    is_conditional: bool = False


@dataclass
class Kernel:
    """One kernel for one architecture; `symbol` is demangled."""

    unit: str
    symbol: str
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    opcodes: Counter = field(default_factory=Counter)
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The unit of a product on tensor cores, else the kernel and its template arguments."""
        return self.unit if self.unit.startswith("launch_") else readable(self.symbol)

    @property
    def spills_in_loops(self) -> int:
        branches = [one for one in self.instructions if one.target is not None]
        loops = [(one.target, one.address) for one in branches if one.target < one.address]
        return sum(
            any(start <= one.address <= stop for start, stop in loops)
            for one in self.instructions
            if one.opcode.startswith(SPILLS)
        )

    @property
    def is_rotation(self) -> bool:
        return self.name.startswith(("rotateRuns", "rotateColumns"))

    @property
    def spills(self) -> int:
        return sum(one.opcode.startswith(SPILLS) for one in self.instructions)

    @property
    def longest_way(self) -> int:
        """Instructions from the first to an EXIT, the most there can be with every loop once and nothing RARE."""
        never = -math.inf
        left = {}  # by address, to the end
        following = never
        for one in reversed(self.instructions):
            jump = left.get(one.target, never)  # a jump back is not there yet
            if one.opcode.startswith((*RARE, "RET")):
                way = never
            elif one.opcode.startswith("EXIT"):
                way = max(0, following) if one.is_conditional else 0
            elif one.target is not None and not one.is_conditional:
                way = jump
            else:
                way = max(jump, following)
            following = left[one.address] = 1 + way
        return following

    @property
    def channels_of_a_thread(self) -> int:
        """Of a rotation in registers, by its template arguments."""
        if split := re.search(r"SplitColumns<(\d+), (\d+)", self.name):
            return int(split[1]) // int(split[2])
        if columns := re.search(r"Columns<(\d+), (\d+), (\d+)", self.name):
            return math.prod(map(int, columns.groups()))
        return RUN * int(re.search(r"(\d+), \d+>$", self.name)[1])

    def count(self, shown: str) -> int:
        """Instructions whose opcode is `shown`, with any modifiers in front of or behind the ones it names."""
        wanted = shown.split(".")
        return sum(n for opcode, n in self.opcodes.items() if _matches(opcode.split("."), wanted))

    def faults(self) -> list[str]:
        needed = next((opcodes for start, opcodes in RULES.items() if self.name.startswith(start)), ())
        found = [f"has no {opcode}" for opcode in needed if not self.count(opcode)]
        if self.spills_in_loops:
            found.append(f"spills {self.spills_in_loops} times in loops")
        if self.is_rotation and self.spills > MOST_SPILLS:
            found.append(f"spills {self.spills} times, more than {MOST_SPILLS}")
        return [f"{self.name} for {self.arch} {fault}" for fault in found]


def _matches(opcode: list[str], wanted: list[str]) -> bool:
    return opcode[0] == wanted[0] and set(wanted) <= set(opcode)


def readable(demangled: str) -> str:
    """rotateRuns<half, 1, 1, 96> from `void lrq::(anonymous namespace)::rotateRuns<__half, ...>(...)`."""
    plain = re.sub(
        r"\(anonymous namespace\)::|\blrq::|^void |\(PrologueKind\)|\(lrq::PrologueKind\)|\(int\)", "", demangled
    )
    return plain.partition("(")[0].replace("signed char", "int8").replace("__nv_", "").replace("__half", "half")


def parse_resources(unit: str, text: str) -> dict[tuple[str, str], Kernel]:
    """Kernels by (architecture, symbol) from `cuobjdump --dump-resource-usage`."""
    kernels, arch, symbol = {}, "", ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif symbol and "REG:" in line:
            value = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", line)}
            kernels[arch, symbol] = Kernel(unit, symbol, arch, value["REG"], value["STACK"], value["SHARED"])
            symbol = ""
    return kernels


def parse_instructions(kernels: dict[tuple[str, str], Kernel], text: str) -> None:
    """Adds what `cuobjdump -sass` lists."""
    arch, kernel = "", None
    for line in text.splitlines():
        if found := re.match(r"\s*code for (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels.get((arch, found[1]))
        elif kernel and (found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line)):
            at, guard, opcode, operands = found.groups()
            target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
            conditional = guard is not None or "P" in operands
            one = Instruction(int(at, 16), opcode, int(target[1], 16) if target else None, conditional)
            kernel.instructions.append(one)
            kernel.opcodes[opcode] += 1


def read_kernels(folder: Path) -> Iterator[Kernel]:
    """All kernels in the objects of a build, by unit."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        sys.exit("kernel_report: needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    objects = sorted(path for path in folder.rglob("*.cu.o") if path.parent.suffix == ".dir")
    if not objects:
        sys.exit(f"kernel_report: no objects of kernels below {folder}: build `plugins` there first")
    for path in objects:
        unit = path.parent.stem
        kernels = parse_resources(unit, _run(tool, "--dump-resource-usage", str(path)))
        parse_instructions(kernels, _run(tool, "-sass", str(path)))
        for kernel, symbol in zip(
            kernels.values(), _run("c++filt", *(s for _, s in kernels)).splitlines(), strict=True
        ):
            kernel.symbol = symbol
            yield kernel


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def print_table(kernels: list[Kernel]) -> None:
    print(f"| kernel | arch | registers | static shared memory | stack | spills, in loops | {' | '.join(SHOWN)} |")
    print("|---" * (6 + len(SHOWN)) + "|")
    for k in kernels:
        counts = " | ".join(str(k.count(shown) or "") for shown in SHOWN)
        spills = f"{k.spills}, {k.spills_in_loops}"
        print(f"| `{k.name}` | {k.arch} | {k.registers} | {k.shared} | {k.stack} | {spills} | {counts} |")


def print_summary(kernels: list[Kernel]) -> None:
    """One line for each family and architecture."""
    families: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        families.setdefault((re.match(r"[A-Za-z_]+[A-Za-z]", kernel.name)[0], kernel.arch), []).append(kernel)
    print("| kernels | arch | how many | registers, most | spills, in loops |")
    print("|---" * 5 + "|")
    for (name, arch), group in sorted(families.items()):
        spills = f"{sum(k.spills for k in group)}, {sum(k.spills_in_loops for k in group)}"
        print(f"| `{name}` | {arch} | {len(group)} | {max(k.registers for k in group)} | {spills} |")


def print_rotations(kernels: list[Kernel]) -> None:
    """Those in registers. A stage of shuffles is a loop: with blocks beyond 32 of runs, and parts beyond 32 of columns,
    there are more than the one that is counted."""
    print("| rotation | arch | registers | channels a thread | instructions, longest way | a channel |")
    print("|---" * 6 + "|")
    for k in kernels:
        if k.is_rotation:
            channels, way = k.channels_of_a_thread, k.longest_way
            print(f"| `{k.name}` | {k.arch} | {k.registers} | {channels} | {way} | {way / channels:.1f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", help="show one architecture; all are checked")
    shown_as = parser.add_mutually_exclusive_group()
    shown_as.add_argument("--summary", action="store_true", help="one line for each family of kernels")
    shown_as.add_argument("--rotations", action="store_true", help="what a rotation in registers executes")
    arguments = parser.parse_args()
    os.environ["PATH"] += (
        os.pathsep
        + str(Path(sys.prefix) / "bin")
        + os.pathsep.join(["", *map(str, Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu13/bin"))])
    )
    kernels = sorted(read_kernels(arguments.folder), key=lambda k: (k.name, int(re.search(r"\d+", k.arch)[0])))
    shown = [kernel for kernel in kernels if arguments.arch in (None, kernel.arch)]
    show = print_summary if arguments.summary else print_rotations if arguments.rotations else print_table
    show(shown)
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    for fault in faults:
        print(f"kernel_report: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
