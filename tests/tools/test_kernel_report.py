"""tools/kernel_report.py sees what breaks its rules."""

import kernel_report
import pytest

RESOURCES = """
Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function decode:
  REG:40 STACK:8 SHARED:512 LOCAL:0 CONSTANT[0]:640 TEXTURE:0
"""
SASS = """
	code for sm_90a
		Function : decode
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x0 */
        /*0010*/                   STL [R1], R2 ;                          /* 0x0 */
        /*0020*/                   PRMT R3, R4, R5, R6 ;                   /* 0x0 */
        /*0030*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;        /* 0x0 */
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;        /* 0x0 */
        /*0050*/               @P1 BRA 0x20 ;                              /* 0x0 */
        /*0060*/                   BRA 0x60;                               /* 0x0 */
"""


def kernel(sass=SASS, name="void lrq::(anonymous namespace)::decodeRuns<lrq::NibblesRun<4>, signed char>(int)"):
    kernels = kernel_report.parse_resources("lrq_decode", RESOURCES)
    kernel_report.parse_instructions(kernels, sass)
    (only,) = kernels.values()
    only.symbol = name
    return only


def test_resources_and_instructions_are_read():
    found = kernel()
    assert (found.registers, found.stack, found.shared, found.arch) == (40, 8, 512, "sm_90a")
    assert found.name == "decodeRuns<NibblesRun<4>, int8>"
    assert [found.count(opcode) for opcode in ("PRMT", "LDG.E.128", "STG.E.128", "IGMMA")] == [1, 1, 1, 0]
    assert (found.spills, found.spills_in_loops) == (1, 0)
    assert found.faults() == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("PRMT R3", "LDL R3"), "has no PRMT"),
        (("STG.E.128", "STG.E.64"), "has no STG.E.128"),
        (("LDG.E.128.CONSTANT R4, [R2.64]", "LDL R4, [R1]"), "spills 1 times in loops"),
    ],
)
def test_a_broken_rule_is_named(change, fault):
    faults = kernel(SASS.replace(*change)).faults()
    assert any(fault in found for found in faults)
    assert all("decodeRuns" in found and "sm_90a" in found for found in faults)


def test_a_hopper_product_without_igmma_is_a_fault():
    found = kernel()
    found.unit = "launch_wgmma_128_256_half"
    assert found.name == "launch_wgmma_128_256_half"
    assert "has no IGMMA" in found.faults()[0]


def test_a_folder_without_a_build_is_said_so(tmp_path):
    with pytest.raises(SystemExit, match="kernel_report"):
        list(kernel_report.read_kernels(tmp_path))
