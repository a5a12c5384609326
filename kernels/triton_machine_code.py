"""What the machine code of a compiled kernel says: registers, spills, copies, products; and what is wrong with it.

Triton carries the disassembler for NVIDIA. What counts is the inner loop: the innermost backward branch around
matrix instructions. `faults` says in sentences why a compiled tile would not be shipped.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxdbsr.kernels.triton_addresses import Instruction, unsettled

# Bytes of shared memory that one program may have (the tiles of cuda:80 serve 8.6, 8.9 and 12.0 as well, which have
# 99 KB of its 163), and the matrix instructions, the fastest first.
SHARED_LIMIT = {"cuda:80": 99 * 1024, "cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024}
MATRIX = {"cuda:80": ("HMMA",), "cuda:90": ("HGMMA", "HMMA"), "hip:gfx942": ("v_mfma",)}

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9_.a-z]+)\s*(.*?);")
_USAGE = re.compile(r"REG:(\d+).*?LOCAL:(\d+)")


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one kernel.

    Args:
        registers: registers of a thread.
        spills: bytes of spilled registers and stack, or instructions that touch them.
        shared: bytes of shared memory.
        matrix: opcode of the matrix instructions, "" where there are none.
        instructions: instructions of the whole kernel, -1 where they are not decoded.
        loop: opcodes of the inner loop in order, empty where they are not decoded.
        unsettled: sentences on matrix instructions that read where not every way to them says, see `triton_addresses`.
    """

    target: str
    registers: int
    spills: int
    shared: int
    matrix: str
    instructions: int
    loop: tuple[str, ...]
    unsettled: tuple[str, ...] = ()

    def mix(self) -> Counter[str]:
        """Instructions of the inner loop by opcode."""
        return Counter(op.split(".")[0] for op in self.loop)

    def copies(self) -> list[str]:
        """Asynchronous copies of the inner loop."""
        return [op for op in self.loop if op.startswith("LDGSTS")]


def faults(
    facts: Facts,
    precision: str,
    copy_bytes: int = 16,
    through_l1: bool = False,
    look_ups: int = 1,
    matrix: str | None = None,
) -> list[str]:
    """What is wrong with the compiled kernel, in sentences; empty where it may be shipped.

    Args:
        precision: one of `triton_configs.PRECISIONS`.
        copy_bytes: width that every asynchronous copy of activations must have; those of weights take 16.
        through_l1: the copies of activations must go through L1.
        look_ups: plain loads that a step may have, of its entries in the tables.
        matrix: the matrix instruction that must be there; None: the fastest of the target.
    """
    found = [*facts.unsettled]
    wanted = matrix or MATRIX[facts.target][0]
    if facts.spills:
        found.append(f"{facts.spills} spills with {facts.registers} registers")
    if facts.shared > SHARED_LIMIT[facts.target]:
        found.append(f"{facts.shared} bytes of shared memory, {SHARED_LIMIT[facts.target]} allowed")
    if precision != "ieee" and facts.matrix != wanted:
        found.append(f"no {wanted} instruction, but {facts.matrix or 'none'}")
    if facts.target.startswith("hip"):
        return found
    if precision != "ieee" and wanted not in facts.mix():
        found.append(f"no {wanted} instruction in the inner loop")
    return found + _copy_faults(facts, copy_bytes, through_l1, look_ups) + _order_faults(facts)


def _copy_faults(facts: Facts, copy_bytes: int, through_l1: bool, look_ups: int) -> list[str]:
    found = []
    mix, copies = facts.mix(), facts.copies()
    if not copies:
        found.append("no asynchronous copy in the inner loop: it is not pipelined")
    if mix["STS"] or mix["LDG"] > look_ups:
        found.append(f"{mix['LDG']} plain loads and {mix['STS']} stores to shared memory in the inner loop")
    narrow = [op for op in copies if not op.endswith((f".{8 * copy_bytes}", ".128"))]
    if narrow:
        found.append(f"copies narrower than {copy_bytes} bytes: {sorted(set(narrow))}")
    if copies and through_l1 and all("BYPASS" in op for op in copies):
        found.append("all copies go past L1")
    return found


def _order_faults(facts: Facts) -> list[str]:
    """A barrier must stand between each wait for wgmma and the next asynchronous copy into its operands."""
    waits = [i for i, op in enumerate(facts.loop) if op.startswith("WARPGROUP.DEPBAR")]
    if "HGMMA" not in facts.mix():
        return []
    for wait in waits:
        after = facts.loop[wait:] + facts.loop[:wait]  # the next step as well
        copy = next((i for i, op in enumerate(after) if op.startswith("LDGSTS.")), len(after))
        if copy < len(after) and not any(op.startswith("BAR.") for op in after[:copy]):
            return ["no barrier between a wait for the matrix unit and the copy into its operands"]
    return [] if waits else ["no wait for the matrix unit"]


def read_amd(text: str, shared: int, target: str) -> Facts:
    """Facts of AMD assembly."""

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", text)
        assert match, key
        return int(match[1])

    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Facts(target, number("vgpr_count"), spills, shared, "v_mfma" if "v_mfma_" in text else "", -1, ())


def read_nvidia(cubin: bytes, shared: int, target: str) -> Facts:
    """Facts of a CUDA binary, by way of `cuobjdump`."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = _USAGE.search(done.stdout + done.stderr)
    assert usage
    decoded = [m.groups(default="") for m in map(_INSTRUCTION.match, done.stdout.splitlines()) if m]
    code = [Instruction(int(address, 16), guard, op, operands) for address, guard, op, operands in decoded]
    ops = [instruction.op for instruction in code]
    spills = int(usage[2]) + sum(op.startswith(("LDL", "STL")) for op in ops)
    matrix = next((name for name in MATRIX[target] if any(op.startswith(name) for op in ops)), "")
    loop = _inner_loop(code, matrix or "FFMA")
    return Facts(target, int(usage[1]), spills, shared, matrix, len(code), loop, tuple(unsettled(code)))


def _inner_loop(code: Sequence[Instruction], work: str) -> tuple[str, ...]:
    """Opcodes of the shortest loop that does `work`, of loops of the same length the busiest."""
    best: tuple[str, ...] = ()
    key = (0, 0)
    for end in code:
        if end.target is None or end.target >= end.address:
            continue
        body = tuple(one.op for one in code if end.target <= one.address <= end.address)
        count = sum(name.startswith(work) for name in body)
        if count and (not best or (len(body), -count) < key):
            best, key = body, (len(body), -count)
    return best
