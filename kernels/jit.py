"""From LLVM IR text to a function in this process: host features, code generation.

Object code is kept on disk (`cache`), one file a module, named by the hash of IR, triple, CPU, features and LLVM
version. Nothing on disk can stop a compilation.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from fxdbsr.kernels import cache as disk

# what code calls the runtime's functions
OPENMP = ("fxdbsr_parallel", "fxdbsr_thread", "fxdbsr_threads", "fxdbsr_barrier")


@dataclass(frozen=True)
class Target:
    """What the code is written for.

    Args:
        triple: LLVM target triple.
        cpu: CPU name as LLVM knows it.
        features: LLVM feature string, such as "+avx2,+fma".
        lanes: float32 in a vector register.
        registers: vector registers.
        vectors: vectors of outputs that a tile holds for each pixel.
        bfloat16: has bfloat16 dot products accumulating in float32.
        tiles: has tile registers that multiply bfloat16 (AMX).
    """

    triple: str
    cpu: str
    features: str
    lanes: int
    registers: int
    vectors: int
    bfloat16: bool = False
    tiles: bool = False


def target_of(triple: str, cpu: str, features: dict[str, bool]) -> Target | None:
    """The target of those features, None where it has no vector unit that the emitter knows."""
    flags = ",".join(("+" if on else "-") + name for name, on in sorted(features.items()))
    if features.get("avx512f"):
        wide = features.get("avx512bf16", False) and features.get("avx512vl", False)
        tiles = wide and features.get("amx-tile", False) and features.get("amx-bf16", False)
        return Target(triple, cpu, f"{flags},-prefer-256-bit", 16, 32, 2, wide, tiles)
    if features.get("avx2") and features.get("fma"):
        return Target(triple, cpu, flags, 8, 16, 2)
    if triple.startswith(("aarch64", "arm64")):
        return Target(triple, cpu, flags, 4, 32, 4)
    return None


@cache
def host(avx512: bool = True, amx: bool = True) -> Target | None:
    """The target of this machine, or of a machine that lacks AVX-512 or AMX but is like it otherwise.

    Raises:
        ImportError: llvmlite is not installed.
    """
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = dict(llvm.get_host_cpu_features())
    amx = amx and avx512 and features.get("amx-bf16", False) and _may_use_tiles()
    for name in features:
        if (name.startswith("avx512") and not avx512) or (name.startswith("amx") and not amx):
            features[name] = False
    return target_of(llvm.get_process_triple(), llvm.get_host_cpu_name(), features)


def _may_use_tiles() -> bool:
    """Ask the system for the use of tile registers, which Linux gives to a process that asks."""
    return bool(torch.cpu._init_amx())


@cache
def openmp() -> tuple[int, ...] | None:
    """Addresses of what `OPENMP` names: `GOMP_parallel` and its kin in torch's OpenMP runtime.

    Looked up through the library that torch computes with, so the runtime is the one whose threads torch
    uses already; None where that has no GNU entry points (macOS, Windows).
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
    except (OSError, AttributeError):
        return None
    return tuple(address for address in addresses if address)


def object_code(text: str, target: Target) -> bytes:
    """The object file of the module `text`.

    Raises:
        RuntimeError: `text` is not valid IR.
    """
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(text)
    module.triple = target.triple
    module.verify()
    return bytes(_machine(target).emit_object(module))


def key(text: str, target: Target) -> str:
    """The name under which the disk holds the code of `text` for `target` by this version of LLVM."""
    import llvmlite.binding as llvm

    parts = (text, target.triple, target.cpu, target.features, str(llvm.llvm_version_info))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Compiled:
    """A function in this process; its code lives as long as this does."""

    address: int
    engine: Any


def function(text: str, target: Target, arguments: int) -> Callable[..., None]:
    """`@run` of the module `text`, which takes that many 64-bit integers and returns nothing.

    The call releases the global interpreter lock.
    """
    compiled = load(text, target, "run")
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(compiled.address)
    run.compiled = compiled  # type: ignore[attr-defined]
    return run


def load(text: str, target: Target, name: str) -> Compiled:
    """The function `name` of the module `text`, from the disk where it was compiled before."""
    with _lock:
        return _load(text, target, name)


@lru_cache(maxsize=512)
def _load(text: str, target: Target, function: str) -> Compiled:
    import llvmlite.binding as llvm

    name = key(text, target)
    code = disk.read(name)
    if code is None:
        code = object_code(text, target)
        disk.write(name, code)
    for symbol, place in zip(OPENMP, openmp() or (), strict=False):
        llvm.add_symbol(symbol, place)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(target))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Compiled(engine.get_function_address(function), engine)


_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _machine(target: Target) -> Any:
    import llvmlite.binding as llvm

    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=2, jit=True
    )
