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


ROTATION = """
	code for sm_90a
		Function : decode
        /*0000*/                   LDG.E.128 R4, [R2.64] ;                 /* 0x0 */
        /*0010*/              @!P0 BRA 0x50 ;                              /* 0x0 */
        /*0020*/                   FRND R1, R2 ;                           /* 0x0 */
        /*0030*/                   FADD R1, R2, R3 ;                       /* 0x0 */
        /*0040*/                   FADD R1, R2, R3 ;                       /* 0x0 */
        /*0050*/                   SHFL.BFLY PT, R1, R2, R3, 0x1f ;        /* 0x0 */
        /*0060*/              @!P1 BRA P2, 0x50 ;                          /* 0x0 */
        /*0070*/               @P3 BRA 0xa0 ;                              /* 0x0 */
        /*0080*/                   STG.E.128 [R2.64], R4 ;                 /* 0x0 */
        /*0090*/                   BRA 0xb0 ;                              /* 0x0 */
        /*00a0*/               @P0 EXIT ;                                  /* 0x0 */
        /*00b0*/                   EXIT ;                                  /* 0x0 */
        /*00c0*/                   BRA 0xc0;                               /* 0x0 */
"""


def rotation(sass=ROTATION, arguments="Columns<12, 4, 1, 0, 512> >"):
    return kernel(
        sass, f"void lrq::rotateColumns<float, (lrq::PrologueKind)0, lrq::{arguments}(lrq::RotateArguments, int)"
    )


def test_the_longest_way_takes_loops_once_and_nothing_rare():
    assert rotation().longest_way == 8  # LDG, BRA, SHFL, BRA, BRA, STG, BRA, EXIT
    assert rotation(ROTATION.replace("FRND", "FADD")).longest_way == 11
    assert (
        rotation(ROTATION.replace("@P3 BRA 0xa0", "BRA 0xa0")).longest_way == 7
    )  # LDG, BRA, SHFL, BRA, BRA, EXIT, EXIT


def test_a_rotation_that_spills_often_is_a_fault():
    line = "        /*0080*/                   STG.E.128 [R2.64], R4 ;                 /* 0x0 */\n"
    assert line in ROTATION

    def faults(spills):
        more = "".join(line.replace("0080", f"{0x1000 + at:04x}").replace("STG.E.128", "STL") for at in range(spills))
        return [fault for fault in rotation(ROTATION + more).faults() if "spills" in fault]

    assert faults(40) == []
    assert "spills 41 times, more than 40" in faults(41)[0]


def test_instructions_are_shared_by_the_channels_of_a_thread(capsys):
    assert rotation().channels_of_a_thread == 48
    assert rotation(arguments="SplitColumns<108, 4, 640> >").channels_of_a_thread == 27
    runs = kernel(
        ROTATION, "void lrq::rotateRuns<float, (lrq::PrologueKind)0, (int)2, (int)1024>(lrq::RotateArguments)"
    )
    assert runs.channels_of_a_thread == 32
    kernel_report.print_rotations([runs, kernel()])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| `rotateRuns<float, 0, 2, 1024>` | sm_90a | 40 | 32 | 8 | 0.2 |"
    ]


def test_a_hopper_product_without_igmma_is_a_fault():
    found = kernel()
    found.unit = "launch_wgmma_128_256_half"
    assert found.name == "launch_wgmma_128_256_half"
    assert "has no IGMMA" in found.faults()[0]


def test_a_folder_without_a_build_is_said_so(tmp_path):
    with pytest.raises(SystemExit, match="kernel_report"):
        list(kernel_report.read_kernels(tmp_path))
