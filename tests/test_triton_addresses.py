"""Matrix instructions whose operands lie where not every way to them says, in machine code written by hand."""

from __future__ import annotations

import pytest

from fxdbsr.kernels.triton_addresses import Instruction, unsettled


def found(text: str) -> list[str]:
    """`unsettled` of lines "@guard op operands", 16 bytes each; a label "name:" stands on a line of its own."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(lines)
        else:
            lines.append(line)
    code = []
    for i, line in enumerate(lines):
        guard, rest = line[1:].split(" ", 1) if line.startswith("@") else ("", line)
        op, _, operands = rest.partition(" ")
        code.append(Instruction(16 * i, guard, op, hex(labels[operands]) if operands in labels else operands))
    return unsettled(code)


# What ptxas 12.8 made of the bitmask kernel, shortened: UR8 is made under the first branch, used under the second
STALE = """
    ULDC.64 UR8, c[0x0][0x210]
    UMOV UR12, 0xffffffff
    step:
    UIADD3 UR12, UR12, 0x1, URZ
    ULEA UR14, UR12, UR6, 0xd
    @!P0 BRA second
    UMOV UR10, UR14
    UMOV UR11, 0x80000020
    UIADD3 UR8, UP0, UR14, 0x2, URZ
    UIADD3.X UR9, URZ, -0x7fffffe0, URZ, UP0, !UPT
    HGMMA.64x32x16.F32 R136, gdesc[UR8], R136
    second:
    @!P1 BRA last
    UMOV UR10, UR14
    UMOV UR11, 0x80000020
    HGMMA.64x32x16.F32 R104, gdesc[UR8], R104
    last:
    @P4 BRA step
    EXIT
"""
START = "UMOV UR6, 0x400\n"


def test_an_address_made_under_another_branch_is_found() -> None:
    (sentence,) = found(START + STALE)
    assert "at 0xe0" in sentence
    assert sentence.endswith("['UR8', 'UR9']")


def test_an_address_made_before_all_branches_is_settled() -> None:
    assert found(START + STALE.replace("@!P0 BRA second\n", "")) == []


def test_an_address_made_anew_under_each_branch_is_settled() -> None:
    again = "UIADD3 UR8, UP0, UR14, 0x2, URZ\nUIADD3.X UR9, URZ, -0x7fffffe0, URZ, UP0, !UPT\n"
    use = "HGMMA.64x32x16.F32 R104"
    assert found(START + STALE.replace(use, again + use)) == []


def test_the_way_from_an_address_to_its_use_is_followed() -> None:
    use = "HGMMA.64x32x16.F32 R104, gdesc[UR8]"
    derived = "UIADD3.64 UR16, UR8, 0xfe, URZ\nUMOV UR18, UR10\nUMOV UR19, UR11\n" + use.replace("UR8", "UR16")
    (sentence,) = found(START + STALE.replace(use, derived))
    assert sentence.endswith("['UR8', 'UR9']")


@pytest.mark.parametrize(
    ("before", "names"),
    [
        ("", "['UR4']"),
        ("UMOV UR4, URZ\n", ""),
        ("@UP0 UMOV UR4, URZ\n", "['UR4']"),
        ("UMOV UR4, URZ\n@UP0 UMOV UR4, 0x1\n", ""),
        ("LDS R7, [R2]\nR2UR UR4, R7\n", ""),
        ("R2UR UR4, R7\n", "['R7']"),
        ("@P0 BRA skip\nMOV R7, 0x1\nskip:\nR2UR UR4, R7\n", "['R7']"),
        ("SHFL.IDX PT, R7, R7, RZ, 0x1f\nR2UR UR4, R7\n", "['R7']"),
        ("S2R R7, SR_TID.X\nSHFL.IDX PT, R7, R7, RZ, 0x1f\nR2UR UR4, R7\n", ""),
    ],
)
def test_what_no_way_sets_is_found(before: str, names: str) -> None:
    rest = "UMOV UR5, 0x1\nUMOV UR6, URZ\nUMOV UR7, 0x1\nHGMMA.64x64x16.F32 R24, gdesc[UR4], R24\nEXIT\n"
    assert [sentence.rpartition(": ")[2] for sentence in found(before + rest)] == [names] * bool(names)


def test_an_operand_in_registers_has_one_descriptor() -> None:
    assert found("UMOV UR4, URZ\nUMOV UR5, 0x1\nHGMMA.64x64x8.F32.TF32 R24, R8, gdesc[UR4], R24\nEXIT\n") == []
