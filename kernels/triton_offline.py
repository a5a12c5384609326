"""Compile the kernels for a GPU that is not there, and read from the machine code whether they are as meant.

Triton carries the compilers and, for NVIDIA, the disassembler. What counts is the inner loop: the innermost
backward branch around matrix instructions. `faults` says in sentences what is wrong with a compiled tile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxdbsr.kernels import triton_bitmask, triton_gather
from fxdbsr.kernels.triton_plan import Tile

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may have, and the matrix instruction.
SHARED_LIMIT = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024}
MATRIX = {"cuda:80": "HMMA", "cuda:90": "HGMMA", "hip:gfx942": "v_mfma"}

GEOMETRIES = {
    "3x3": {"H": 14, "W": 14, "C": 256, "P": 14, "Q": 14, "O": 256, "R": 3, "S": 3, "PH": 1, "PW": 1},
    "1x1": {"H": 14, "W": 14, "C": 256, "P": 14, "Q": 14, "O": 1024, "R": 1, "S": 1, "PH": 0, "PW": 0},
    "7x7": {"H": 14, "W": 14, "C": 256, "P": 14, "Q": 14, "O": 256, "R": 7, "S": 7, "PH": 3, "PW": 3},
}

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.a-z]+)\s*(.*?);")
_USAGE = re.compile(r"REG:(\d+).*?LOCAL:(\d+)")


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one kernel.

    Args:
        registers: registers of a thread.
        spills: bytes of spilled registers and stack, or instructions that touch them.
        shared: bytes of shared memory.
        matrix: matrix instructions in the whole kernel.
        instructions: instructions of the whole kernel, -1 where they are not decoded.
        loop: opcodes of the inner loop in order, empty where they are not decoded.
    """

    target: str
    registers: int
    spills: int
    shared: int
    matrix: int
    instructions: int
    loop: tuple[str, ...]

    def mix(self) -> Counter[str]:
        """Instructions of the inner loop by opcode."""
        return Counter(op.split(".")[0] for op in self.loop)

    def copies(self) -> list[str]:
        """Asynchronous copies of the inner loop."""
        return [op for op in self.loop if op.startswith("LDGSTS")]


def _pointers(dtype: str, *indices: str) -> dict[str, str]:
    floats = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weights", "bias", "residual", "y")}
    return floats | {f"{name}_ptr": "*i32" for name in ("entries", "pointers", "outputs", *indices)}


SCALARS = {"pixels": "i32", "unions": "i32", "slope": "fp32"}
EPILOGUE = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "ACTIVATION": "relu"}
UNIT = {"SH": 1, "SW": 1, "DH": 1, "DW": 1}


def compile_gather(
    tile: Tile, precision: str, dtype: str, geometry: str, target: str, splits: int = 1, **changes: Any
) -> Facts:
    """`gather_kernel` compiled for `target`.

    Args:
        precision: one of `triton_plan.PRECISIONS`.
        dtype: Triton's name, "fp16", "bf16" or "fp32".
        geometry: key of `GEOMETRIES`.
        changes: other values for the kernel's constants.
    """
    pointers = _pointers(dtype)
    if splits > 1:
        pointers["y_ptr"] = "*fp32"
    constants = {
        **GEOMETRIES[geometry],
        **UNIT,
        **EPILOGUE,
        "BM": tile.pixels,
        "BN": tile.outputs,
        "BK": tile.depth,
        "EW": min(32, tile.depth),
        "RUN": min(16, tile.outputs),
        "FULL": True,
        "PRECISION": "ieee" if precision == "16" else precision,
        "WEIGHTS_FIRST": tile.weights_first,
        "SPLITS": splits,
        "CACHE": tile.cache,
        **changes,
    }
    return compile_kernel(triton_gather.gather_kernel, pointers, SCALARS, constants, tile.warps, tile.stages, target)


def compile_bitmask(tile: Tile, precision: str, dtype: str, geometry: str, target: str) -> Facts:
    """`bitmask_kernel` compiled for `target`; arguments as in `compile_gather`."""
    constants = {
        **GEOMETRIES[geometry],
        **UNIT,
        **EPILOGUE,
        "BM": tile.pixels,
        "BN": tile.outputs,
        "BK": tile.depth,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "CACHE": tile.cache,
        "STAGES": tile.stages,
    }
    return compile_kernel(
        triton_bitmask.bitmask_kernel,
        _pointers(dtype, "blocks"),
        SCALARS,
        constants,
        tile.warps,
        tile.stages,
        target,
    )


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str],
    scalars: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    target: str,
) -> Facts:
    """`kernel` compiled, and read; `pointers` are taken to be multiples of 16 bytes."""
    names = kernel.arg_names
    types = {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared = compiled.metadata.shared
    if target.startswith("hip"):
        return _read_amd(compiled.asm["amdgcn"], shared, target)
    return _read_nvidia(compiled.asm["cubin"], shared, target)


def faults(facts: Facts, precision: str, copy_bytes: int = 16, look_ups: int = 1) -> list[str]:
    """What is wrong with the compiled kernel, in sentences; empty where it may be shipped.

    Args:
        copy_bytes: width that every asynchronous copy must have.
        look_ups: plain loads that a step may have, of its entries in the tables.
    """
    found = []
    if facts.spills:
        found.append(f"{facts.spills} spills with {facts.registers} registers")
    if facts.shared > SHARED_LIMIT[facts.target]:
        found.append(f"{facts.shared} bytes of shared memory, {SHARED_LIMIT[facts.target]} allowed")
    if precision != "ieee" and not facts.matrix:
        found.append(f"no {MATRIX[facts.target]} instruction")
    if facts.target.startswith("hip"):
        return found
    if precision != "ieee" and not any(op.startswith(MATRIX[facts.target]) for op in facts.loop):
        found.append(f"no {MATRIX[facts.target]} instruction in the inner loop")
    mix = facts.mix()
    if not facts.copies():
        found.append("no asynchronous copy in the inner loop: it is not pipelined")
    if mix["STS"] or mix["LDG"] > look_ups:
        found.append(f"{mix['LDG']} plain loads and {mix['STS']} stores to shared memory in the inner loop")
    narrow = [op for op in facts.copies() if not op.endswith(f".{8 * copy_bytes}")]
    if narrow:
        found.append(f"copies narrower than {copy_bytes} bytes: {sorted(set(narrow))}")
    if facts.target == "cuda:90" and precision != "ieee" and not _barrier_before_copies(facts.loop):
        found.append("no barrier between the wait for the matrix unit and the copy into its operands")
    return found


def _barrier_before_copies(loop: tuple[str, ...]) -> bool:
    """A barrier of the program stands between the last wait for wgmma and the next asynchronous copy."""
    waits = [i for i, op in enumerate(loop) if op.startswith("WARPGROUP.DEPBAR")]
    if not waits:
        return False
    after = loop[waits[-1] :]
    copy = next((i for i, op in enumerate(after) if op.startswith("LDGSTS.")), len(after))
    return copy == len(after) or any(op.startswith("BAR.") for op in after[:copy])


def _read_amd(text: str, shared: int, target: str) -> Facts:
    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", text)
        assert match, key
        return int(match[1])

    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Facts(target, number("vgpr_count"), spills, shared, len(re.findall("v_mfma_", text)), -1, ())


def _read_nvidia(cubin: bytes, shared: int, target: str) -> Facts:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = _USAGE.search(done.stdout + done.stderr)
    assert usage
    decoded = [m.groups() for m in map(_INSTRUCTION.match, done.stdout.splitlines()) if m]
    code = [(int(address, 16), op, rest) for address, op, rest in decoded]
    ops = [op for _, op, _ in code]
    spills = int(usage[2]) + sum(op.startswith(("LDL", "STL")) for op in ops)
    matrix = sum(op.startswith(MATRIX[target]) for op in ops)
    work = MATRIX[target] if matrix else "FFMA"
    return Facts(target, int(usage[1]), spills, shared, matrix, len(code), _inner_loop(code, work))


def _inner_loop(code: list[tuple[int, str, str]], work: str) -> tuple[str, ...]:
    """Opcodes of the shortest loop that does `work`, of loops of the same length the busiest."""
    best: tuple[str, ...] = ()
    key = (0, 0)
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address:
            continue
        body = tuple(name for at, name, _ in code if int(target[1], 16) <= at <= address)
        count = sum(name.startswith(work) for name in body)
        if count and (not best or (len(body), -count) < key):
            best, key = body, (len(body), -count)
    return best
