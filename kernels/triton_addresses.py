"""Whether machine code computes the addresses that its matrix instructions read on every way to them.

wgmma reads its operands from shared memory, at descriptors in registers. ptxas 12.8, of Triton 3.6 and 3.7, computes
a descriptor that several branches need under the first of them, and uses it under the others. Where the first is not
taken, the matrix unit reads where an earlier step did, or anywhere: wrong sums, or an illegal access of memory.

Registers are followed as in static single assignment form (R. Cytron et al., Efficiently computing static single
assignment form and the control dependence graph, 1991): where ways meet on which a register holds different values, it
holds one of its own. At the head of a loop that is "carried" from step to step, as the number of a buffer is. Elsewhere
it is "merged" and depends on a branch, which no address of a kernel here does by intent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Value = tuple[str, int, str]  # "set" by instruction i, "carried" or "merged" into block i, or "unset"; the register
Values = dict[str, Value]
_REGISTER = re.compile(r"\b(U?R)(\d+)\b(\.64)?")
_DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")
_WORDS = {"128": 4, "64": 2, "WIDE": 2, "CS2R": 2}  # what part of a name says how many registers it sets


@dataclass(frozen=True)
class Instruction:
    """One instruction of NVIDIA's machine code.

    Args:
        guard: predicate without which it does nothing, "" where there is none.
    """

    address: int
    guard: str
    op: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where it branches to, None where it is no branch."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.op.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        conditional = bool(self.guard) or bool(re.match(r"!?U?P\d", self.operands))
        return conditional or not self.op.startswith(("BRA", "EXIT", "RET"))

    def writes(self) -> list[str]:
        """The registers that it sets, of those that addresses are made of."""
        first = self.operands.split(",")[1 if self.op.startswith("SHFL") else 0].strip()
        found = _REGISTER.fullmatch(first)
        if found is None or self.op.startswith("HGMMA"):
            return []
        words = max(_WORDS.get(part, 1) for part in self.op.split("."))
        return _consecutive(found[1], int(found[2]), words)

    def reads(self) -> list[str]:
        """The registers that it reads; of a matrix instruction those of its descriptors."""
        if self.op.startswith("HGMMA"):
            words = 4 if self.operands.split(",")[1].lstrip().startswith("gdesc") else 2
            return [r for at in _DESCRIPTOR.findall(self.operands) for r in _consecutive("UR", int(at), words)]
        written = self.writes()
        if self.op.startswith("LD"):
            return []  # what memory holds is no matter of ways
        sources = self.operands.split(",", 1)[1] if written and "," in self.operands else self.operands
        found = []
        for kind, number, pair in _REGISTER.findall(sources):
            found += _consecutive(kind, int(number), 2 if pair or ".64" in self.op else 1)
        return found + (written if self.guard else [])  # what it leaves alone where the guard is false


def _consecutive(kind: str, first: int, count: int) -> list[str]:
    return [f"{kind}{n}" for n in range(first, first + count)]


def unsettled(code: Sequence[Instruction]) -> list[str]:
    """A sentence for each matrix instruction that reads at an address which some way to it does not compute."""
    sources = _sources(code)
    found = []
    for i, instruction in enumerate(code):
        seen: set[Value] = set()
        left = list(sources[i]) if instruction.op.startswith("HGMMA") else []
        while left:
            value = left.pop()
            if value not in seen:
                seen.add(value)
                left += sources[value[1]] if value[0] == "set" else []
        names = sorted(register for kind, _, register in seen if kind in ("merged", "unset"))
        if names:
            found.append(f"{instruction.op} at {instruction.address:#x} reads where not every way to it says: {names}")
    return found


def _sources(code: Sequence[Instruction]) -> list[list[Value]]:
    """For each instruction the values of the registers that it reads."""
    blocks = _blocks(code)
    found: list[list[Value]] = [[] for _ in code]
    for block, values in zip(blocks, _at_start(code, blocks), strict=True):
        now = dict(values)
        for i in block:
            found[i] = [now.get(register, ("unset", 0, register)) for register in code[i].reads()]
            now.update({register: ("set", i, register) for register in code[i].writes()})
    return found


def _blocks(code: Sequence[Instruction]) -> list[range]:
    """The straight pieces of the code."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    starts = {0, len(code)}
    for i, instruction in enumerate(code):
        if instruction.op.startswith(("BRA", "EXIT", "RET")):
            starts.add(i + 1)
        if instruction.target in at:
            starts.add(at[instruction.target])
    return [range(*pair) for pair in pairwise(sorted(starts))]


def _at_start(code: Sequence[Instruction], blocks: Sequence[range]) -> list[Values]:
    """What the registers hold where each block starts."""
    before = _predecessors(code, blocks)
    written: list[Values] = [
        {register: ("set", i, register) for i in block for register in code[i].writes()} for block in blocks
    ]
    start: list[Values] = [{} for _ in blocks]  # empty where no way has been followed to yet
    start[0] = {r: ("unset", 0, r) for instruction in code for r in (*instruction.reads(), *instruction.writes())}
    changed = True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            ends = [start[b] | written[b] for b in before[number]]
            values = dict(_meet(ends, number, start[number], any(b >= number for b in before[number])))
            changed |= values != start[number]
            start[number] = values
    return start


def _meet(ends: Sequence[Values], number: int, held: Mapping[str, Value], loop: bool) -> Iterator[tuple[str, Value]]:
    """What registers hold where the ways that end in `ends` meet; `held` is what was found before."""
    for register in {register for values in ends for register in values}:
        values = {values[register] for values in ends if register in values}
        mine = {(kind, number, register) for kind in ("merged", "carried")}
        if len(values) > 1 or held.get(register) in mine:
            yield register, ("carried" if loop else "merged", number, register)
        else:
            yield register, values.pop()


def _predecessors(code: Sequence[Instruction], blocks: Sequence[range]) -> list[list[int]]:
    number_of = {code[block.start].address: number for number, block in enumerate(blocks)}
    found: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        last = code[block.stop - 1]
        if last.target in number_of:
            found[number_of[last.target]].append(number)
        if last.goes_on and number + 1 < len(blocks):
            found[number + 1].append(number)
    return found
