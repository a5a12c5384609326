"""The Triton engine on a GPU: numbers first, then time.

    python -m bench.gpu                       correctness, then ResNet-50 and VGG-11, fp16 and fp32, within 8 minutes
    python -m bench.gpu --part models         whole networks against torch.compile
    python -m bench.gpu --offline             no GPU: the planner's choices and estimates, marked `measured: false`
    python -m bench.gpu --offline --rehearse  no GPU: the measuring code itself, on small convs in Triton's interpreter

Parts: correctness, layers, candidates, tiles, compile, bsr (bench/gpu_layers.py), models (gpu_models.py), timeline
(gpu_timeline.py), hazards (gpu_hazards.py), ceilings (gpu_ceilings.py), training (gpu_training.py), hand (gpu_hand.py),
sanitizer, profile (gpu_tools.py).

Every case is one JSON object on a line of the output file; a second run skips the cases that are there. Times are
medians with quartiles over replays of CUDA graphs, all arms in turns, in one process; ratios are medians of the rounds'
ratios, printed beside the roofline's ceiling. Exits 2 where there is no GPU, unless called with --offline; 1 where a
kernel gave wrong numbers; 3 where the GPU was lost: run again, the case that lost it is skipped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.gpu_compiled import give_inductor_tritons_assembler
from bench.gpu_setting import BLOCKS, DTYPES, Case, Records, Setting

OF_LAYERS = ("correctness", "layers", "candidates", "tiles", "compile", "bsr")
OF_TOOLS = ("sanitizer", "profile")
PARTS = (*OF_LAYERS, "hand", "models", "timeline", "hazards", "ceilings", "training", *OF_TOOLS)
MODELS = ("resnet50", "vgg11", "resnext50_32x4d", "vgg11_features", "fpn_resnet50")
MASKS = ("exact", "covered")
DEFAULT_PARTS = ("correctness", "models", "layers")


def cases(options: argparse.Namespace, records: Records) -> Iterator[Case]:
    """All cases asked for, part by part."""
    for part in options.part:
        if part in OF_LAYERS:
            yield from import_module("bench.gpu_layers").cases(part, options)
        elif part in OF_TOOLS:
            yield from import_module("bench.gpu_tools").cases(part, records.all)
        else:
            yield from import_module(f"bench.gpu_{part}").cases(options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=DEFAULT_PARTS)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS[:2])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=("fp16", "fp32"))
    parser.add_argument("--batch", nargs="+", type=int, default=(32,))
    parser.add_argument("--block", nargs="+", choices=BLOCKS, default=("32x32", "128x32"))
    parser.add_argument("--sparsity", nargs="+", type=int, default=(50, 70, 90), help="percent")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS[:1], help="of whole networks")
    parser.add_argument("--repeats", type=int, default=20, help="runs that must agree bit for bit")
    parser.add_argument("--seconds", type=float, default=450, help="start no case after this time")
    parser.add_argument("--within", type=float, help="seconds after which all should be over (default: 30 more)")
    parser.add_argument(
        "--tuning", type=float, default=240, help="seconds for torch.compile's max-autotune; 0: without"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.jsonl"))
    parser.add_argument("--ahead", type=float, default=60, help="seconds to compile kernels in other processes first")
    parser.add_argument("--offline", action="store_true", help="estimates only, no GPU needed")
    parser.add_argument("--rehearse", action="store_true", help="with --offline: run the measuring code on the CPU")
    parser.add_argument("--limit", type=int, help="cases of a part")
    options = parser.parse_args(arguments)
    if options.rehearse and not options.offline:
        parser.error("--rehearse: only together with --offline")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases that the output file does not hold yet."""
    options = parse(arguments)
    if not options.offline and not torch.cuda.is_available():
        print("bench.gpu: no GPU here; --offline prints the planner's estimates", file=sys.stderr)
        return 2
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    if not options.offline:
        give_inductor_tritons_assembler()
    torch.backends.cudnn.benchmark = True  # from the start: what cuDNN has chosen for a shape, it keeps
    started = time.monotonic()
    within = options.seconds + 30 if options.within is None else options.within
    records = Records(options.out, measured=not options.offline)
    setting = Setting(options.rehearse, options.repeats, stop=started + within, tuning=options.tuning)
    todo = [case for case in limited(cases(options, records), options.limit) if not records.has(case)]
    if todo and not options.offline:
        compile_kernels(options)
    wrong = 0
    for case in todo:
        if time.monotonic() > started + options.seconds:
            print(f"bench.gpu: {options.seconds:.0f} s are over, run again for the rest", file=sys.stderr)
            break
        found = case.estimate()
        if case.measure is not None and (options.rehearse or not options.offline):
            found |= attempt(case, setting, records)
        record = records.add(case, found)
        wrong += "wrong" in record
        print(line(record), flush=True)
        if found.get("interrupted"):
            return 3
    return int(wrong > 0)


def limited(cases: Iterator[Case], limit: int | None) -> Iterator[Case]:
    """At most `limit` cases of each part."""
    seen: dict[str, int] = {}
    for case in cases:
        part = case.key["part"]
        seen[part] = seen.get(part, 0) + 1
        if limit is None or seen[part] <= limit:
            yield case


def attempt(case: Case, setting: Setting, records: Records) -> dict[str, Any]:
    """The measurement, or what kept it from being taken; an error in a rehearsal is raised."""
    assert case.measure is not None
    try:
        return case.measure(setting)
    except Exception as error:
        if setting.rehearse:
            raise
        found = {"failed": f"{type(error).__name__}: {str(error)[-600:]}"}
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return {**found, "interrupted": f"the GPU was lost: {error}"}
    return found


def compile_kernels(options: argparse.Namespace) -> None:
    """Fill Triton's cache with the kernels that the parts asked for run."""
    from bench import gpu_ahead

    jobs = gpu_ahead.jobs(options) if options.ahead > 0 else []
    if not jobs:
        return
    major, minor = torch.cuda.get_device_capability()
    started = time.monotonic()
    failed = gpu_ahead.compile_ahead(jobs, 10 * major + minor, options.ahead)
    print(f"compiled ahead in {time.monotonic() - started:.0f} s", *failed[:5], sep="\n", flush=True)


def line(record: dict[str, Any]) -> str:
    """A record in one line."""
    key = " ".join(str(value) for value in record["key"].values())
    bad = [f"{word.upper()}: {record[word]}" for word in ("wrong", "failed", "skipped") if word in record][:1]
    ratios = [
        f"{name} {value[1]:.2f}x" for name, value in record.items() if " over " in name and isinstance(value, list)
    ]
    ceilings = [
        f"{name} {value:.2f}x"
        for name, value in record.items()
        if name.startswith(("ceiling", "estimated over")) and not bad
    ]
    times = [f"{name[3:]} {value[1]:.1f} us" for name, value in record.items() if name.startswith("us ") and value]
    missing = [f"{name}: {value}" for name, value in record.items() if name.startswith("no ")]
    rest = [record[name] for name in ("choice", "reason", "form", "engines", "layers") if record.get(name) and not bad]
    return f"{key}: " + "; ".join(map(str, (*bad, *ratios, *ceilings, *times, *missing, *rest)))


if __name__ == "__main__":
    sys.exit(main())
