"""Other programs that look at the kernels while they run: compute-sanitizer and Nsight Compute.

Each starts this module again as a process of its own, which runs one conv in one form a few times, or a network:

    sanitizer   memcheck, racecheck and synccheck on small convs and a small network, of every kernel, side by side
    profile     counters of the layers whose sparse kernels take longest in the file of records
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import nn

import fxdbsr
from bench.gpu_convs import Conv, Problem, chosen, convs
from bench.gpu_hazards import CONVS
from bench.gpu_setting import BLOCKS, DTYPES, Case, Setting, set_precision
from fxdbsr.commands.spread import spread_mask
from fxdbsr.layers import blocked_layers

CHECKS = ("memcheck", "racecheck", "synccheck")
NETWORK = "network"  # in place of a form: what else a converted model calls
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gather": ("fp16", {"kernel": "gather", "rows_per_union": 2}),
    "gather tf32": ("tf32", {"kernel": "gather", "rows_per_union": 1}),
    "gather ieee": ("fp32", {"kernel": "gather", "rows_per_union": 1}),
    "bitmask": ("fp16", {"kernel": "bitmask"}),
    "3xTF32": ("fp32", {"precision": "3xtf32"}),
}
SANITIZED = [(check, form) for check in CHECKS for form in (*FORMS, NETWORK)]
MOST_OFF = 4e-3  # of the largest output, in 16 bits
COUNTERS = {
    "gpu__time_duration.sum": "ns",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "l1tex__throughput.avg.pct_of_peak_sustained_elapsed": "L1 %",
    "sm__inst_executed_pipe_tensor.sum.pct_of_peak_sustained_elapsed": "matrix %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
}
SLOWEST = 3


@cache
def started(setting: Setting) -> dict[tuple[str, str], Future[dict[str, Any]]]:
    """What compute-sanitizer will say, by check and form; all of its processes run at once."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    return {(check, form): pool.submit(sanitized, check, form, "3x3", setting) for check, form in SANITIZED}


def sanitized(check: str, form: str, conv: str, setting: Setting) -> dict[str, Any]:
    """What compute-sanitizer says of one form on one small conv, or of the small network."""
    command = [sys.executable, "-m", "bench.gpu_tools"]
    if form == NETWORK:
        command += [NETWORK]
    else:
        dtype, arguments = FORMS[form]
        command += _as_arguments(CONVS[conv].small(), dtype, 1, "32x32", 50, 1, arguments)
    if setting.rehearse:
        return {"command": subprocess.run(command, check=True, capture_output=True).returncode}
    tool = _tool("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    # each tensor in memory of its own: the caching allocator would hide what is read or written beside one
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", check, *command]
    limits: dict[str, Any] = {"timeout": patience(setting), "env": environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **limits)
    text = done.stdout + done.stderr
    summary = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", text)
    clean = done.returncode == 0 and summary and summary[-1].startswith("0 ")
    return {"summary": summary[-1]} if clean else {"wrong": [*summary, text[-500:]]}


def profiled(rank: int, records: list[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """Counters of the sparse kernel that is `rank` from the slowest in the records of part "layers"."""
    timed = [r for r in records if r["key"].get("part") == "layers" and r["measured"] and "us sparse" in r]
    timed = [r for r in timed if r["key"]["dtype"] == "fp16" and r["choice"] == "sparse"]
    slowest = sorted({_name(r): r for r in timed}.values(), key=lambda r: -r["us sparse"][1] * r["key"]["count"])
    if setting.rehearse or rank >= len(slowest):
        return {"skipped": "no such layer among the records; run --part layers first"}
    key = slowest[rank]["key"]
    conv = next(c for c in convs(key["model"]) if c.name == key["layer"])
    settings: tuple[Any, ...] = (key["dtype"], key["batch"], key["block"], key["sparsity"], 3, {})
    tool = _tool("ncu")
    if tool is None:
        return {"skipped": "ncu is not installed"}
    command = [tool, "--clock-control", "none", "--csv", "--metrics", ",".join(COUNTERS), "-k", "regex:gather|bitmask"]
    command += [sys.executable, "-m", "bench.gpu_tools", *_as_arguments(conv, *settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience(setting))
    counters = _counters(done.stdout)
    return {"layer": key, "counters": counters} if counters else {"failed": (done.stdout + done.stderr)[-500:]}


def patience(setting: Setting) -> float:
    """Seconds that a tool may take: all that are left, 10 to 240."""
    return min(240.0, max(10.0, setting.left()))


def _counters(text: str) -> dict[str, float]:
    """Counters of the last kernel in the output of `ncu --csv`, without those that this GPU does not have ("n/a")."""
    lines = text[text.index('"ID"') :] if '"ID"' in text else ""
    rows = list(csv.DictReader(io.StringIO(lines)))
    last = [row for row in rows if row["ID"] == rows[-1]["ID"]]
    found = {}
    for row in last:
        with suppress(ValueError):
            found[COUNTERS[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    return found


def _name(record: dict[str, Any]) -> str:
    return json.dumps(record["key"])


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def _as_arguments(
    conv: Conv, dtype: str, batch: int, block: str, sparsity: int, calls: int, form: dict[str, Any]
) -> list[str]:
    settings = [dtype, batch, block, sparsity, calls, form]
    return [json.dumps(asdict(conv)), json.dumps(settings)]


def run_once(conv_text: str, settings_text: str) -> None:
    """Run one conv a few times on whatever device there is; for the tools above."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(conv_text).items()}
    dtype, batch, block, sparsity, calls, form = json.loads(settings_text)
    set_precision(dtype)
    conv = Conv(**values)
    layer = conv.layer(batch, DTYPES[dtype], BLOCKS[block], 1 - sparsity / 100)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem.of(layer, device, 1)
    run = problem.sparse(**(form or chosen(layer, device)))
    for _ in range(calls):
        run(*problem.inputs[0])


def small_network() -> nn.Module:
    """A network whose dense convs, pools and epilogues need every other kernel of the engine once."""
    torch.manual_seed(0)

    def grouped(width: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(128, 128, 3, stride, 1, groups=128 // width)

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # the stem, with its pool inside
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # gather, with its pool inside
        nn.Conv2d(128, 128, 1), nn.SiLU(),
        grouped(4), nn.ReLU(), grouped(8), nn.ReLU(), grouped(16, 2), nn.SiLU(),
        nn.Conv2d(128, 64, 1), nn.MaxPool2d(3, 2, 1),
    ).eval()  # fmt: skip


def half_off(prepared: nn.Module) -> nn.Module:
    """The network with half of each layer's blocks off, no channel dead."""
    generator = torch.Generator().manual_seed(0)
    for layer in blocked_layers(prepared):
        rows, columns = layer.mask.shape
        layer.set_mask(spread_mask((rows, columns), 0.5, generator, True))
    return prepared


def run_network() -> None:
    """Run the network above by every backend, and one whose first conv has seven taps a side and no pool.

    Raises:
        ValueError: the numbers are wrong.
    """
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.Conv2d(64, 64, 1)).eval()
    x = torch.randn(2, 3, 37, 42, device="cuda").half().to(memory_format=torch.channels_last)
    for network in (small_network(), stem):
        prepared = half_off(fxdbsr.prepare(network, config=fxdbsr.BlockConfig((32, 32)))).cuda()
        exact = copy.deepcopy(prepared).double()(x.double())
        for backend in ("auto", "triton", "dense"):
            fast = fxdbsr.convert(prepared, backend=backend).half()
            with torch.inference_mode():
                error = (fast(x).double() - exact).abs().max() / exact.abs().max()
            if not error < MOST_OFF:
                raise ValueError(f"{backend}: off by {float(error):.3g} of the largest output")
    torch.cuda.synchronize()


def cases(part: str, records: list[dict[str, Any]]) -> Iterator[Case]:
    """The cases of one tool."""
    if part == "sanitizer":
        for check, form in SANITIZED:
            yield _sanitizer(check, form)
    if part == "profile":
        for rank in range(SLOWEST):
            yield _profile(rank, records)


def _sanitizer(check: str, form: str) -> Case:
    key = {"part": "sanitizer", "check": check, "form": form, "of": form if form == NETWORK else "3x3"}
    return Case(key, dict, lambda setting: started(setting)[check, form].result())


def _profile(rank: int, records: list[dict[str, Any]]) -> Case:
    return Case({"part": "profile", "rank": rank}, dict, lambda setting: profiled(rank, records, setting))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="run one conv or the network, for compute-sanitizer and ncu")
    parser.add_argument("conv", help=f"as JSON, or {NETWORK!r}")
    parser.add_argument("settings", nargs="?")
    given = parser.parse_args()
    if given.conv == NETWORK:
        run_network()
    else:
        run_once(given.conv, given.settings)
