"""The first minutes on a GPU: everything that is open, in the order of its value, in calls of 10 minutes at most.

    python -m bench.gpu_first              as far as 9 minutes go; call it again until it says that all is done
    python -m bench.gpu_first --list       the steps
    python -m bench.gpu_first --offline    a rehearsal on the CPU: every step, small, nothing timed

Each step is a call of bench.gpu with a share of the time. What a step has measured stands in the output file before
the next begins, and a second call goes on where the first one stopped, also with a file from another machine. Where
minutes are few, compile the kernels elsewhere (`bench.gpu_ahead`), and take torch's and Triton's caches along.
Ends with a table of ratios beside their targets. Exits like bench.gpu.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import gpu
from bench.gpu_setting import Records, whole_lines


@dataclass(frozen=True)
class Step:
    """One call of bench.gpu.

    Args:
        why: what it answers.
        seconds: after which it starts no further case.
    """

    name: str
    why: str
    seconds: float
    arguments: str

    @property
    def least(self) -> float:
        """Seconds that must be left to begin it: a network has to be compiled first."""
        return 180 if "models" in self.arguments else 30


STEPS = (
    Step("headline", "ResNet-50 in 16 bits against torch.compile, the figure to quote", 240,
         "--part models timeline --model resnet50 --dtype fp16 --block 128x32 32x32 --ahead 40"),
    Step("vgg", "wide 3x3 convs, where sparsity itself should pay", 120,
         "--part models --model vgg11_features vgg11 --dtype fp16 --block 128x32 --tuning 0 --ahead 40"),
    Step("grouped", "ResNeXt-50 in 16 bits", 90,
         "--part models --model resnext50_32x4d --dtype fp16 --block 32x32 --tuning 0 --ahead 30"),
    Step("float32", "ieee float32 and 3xTF32 against true float32", 120,
         "--part models --model resnet50 --dtype fp32 --block 32x32 --tuning 0 --ahead 30"),
    Step("sanitizer", "memory and races by compute-sanitizer, the bitmask kernel's too", 120, "--part sanitizer"),
    Step("races", "1000 equal runs of every kernel, streams, graphs, compile, export, no waiting", 180,
         "--part hazards --dtype fp32 bf16 tf32 fp16"),
    Step("one image", "batch 1, where launches and fusion decide", 90,
         "--part models --model resnet50 --dtype fp16 --batch 1 --block 128x32 --sparsity 50 90 --tuning 0 --ahead 30"),
    Step("large batch", "batch 128", 90,
         "--part models --model resnet50 --dtype fp16 --batch 128 --block 128x32 --sparsity 50 90 "
         "--tuning 0 --ahead 0"),
    Step("training", "a training step, prepared over dense", 120, "--part training --model resnet50"),
    Step("tf32 and bf16", "the other precisions", 120,
         "--part models --model resnet50 --dtype tf32 bf16 --block 128x32 --sparsity 50 90 --tuning 0 --ahead 30"),
    Step("detection", "the backbone of a detector at 800x1088", 90,
         "--part models --model fpn_resnet50 --dtype fp16 --batch 1 8 --block 128x32 --sparsity 70 "
         "--tuning 0 --ahead 0"),
    Step("tiles", "which tile each conv runs fastest on", 120,
         "--part tiles --model resnet50 --dtype fp16 --block 128x32 32x32 --sparsity 50 90 --ahead 90"),
    Step("numbers", "are the kernels right on this GPU and this Triton", 150,
         "--part correctness --model resnet50 --dtype fp16 fp32 --block 32x32 --sparsity 50 --ahead 60"),
    Step("layers", "each conv against cuDNN: does the planner put it where it is faster", 150,
         "--part layers --model resnet50 vgg11 --dtype fp16 --block 128x32 32x32 --ahead 40"),
    Step("candidates", "is the planner's form within 5 % of the best", 150,
         "--part candidates --model resnet50 vgg11 --dtype fp16 --block 32x32 --sparsity 50 90 --ahead 60"),
    Step("by hand", "is the planner within 5 % of the best on the layers that were worked by hand", 90,
         "--part hand --ahead 90"),
    Step("ceilings", "what this GPU can do, and what the planner's model takes for granted", 60,
         "--part ceilings"),
    Step("profile", "what limits the three slowest layers", 90, "--part profile"),
    Step("compiled layers", "each wide conv against torch.compile", 120,
         "--part compile bsr --model resnet50 --dtype fp16 --block 32x32 --sparsity 50 --ahead 0"),
)  # fmt: skip

# (model, dtype, batch, block): the least ratios at 50, 70 and 90 %, of which arm
TARGETS: dict[tuple[str, str, int, str, str], tuple[float, float, float]] = {
    ("resnet50", "fp16", 32, "128x32", "sparse"): (1.5, 1.7, 1.85),
    ("resnet50", "fp16", 32, "32x32", "sparse"): (1.3, 1.5, 1.8),
    ("vgg11", "fp16", 32, "128x32", "sparse"): (1.9, 2.7, 4.5),
    ("vgg11_features", "fp16", 32, "128x32", "sparse"): (1.9, 2.7, 4.5),
    ("resnet50", "fp32", 32, "32x32", "sparse"): (1.8, 2.6, 4.0),
    ("resnet50", "fp32", 32, "32x32", "3xTF32"): (2.4, 3.4, 5.0),
    ("resnext50_32x4d", "fp16", 32, "32x32", "sparse"): (1.1, 1.3, 1.5),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the steps that are not done, as far as the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="of this call")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")) / "gpu.jsonl")
    parser.add_argument("--from", dest="source", type=Path, default=Path("bench/results/gpu.jsonl"),
                        help="records of earlier calls, copied to --out first")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the steps")
    parser.add_argument("--offline", action="store_true", help="rehearse on the CPU")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{step.name:16} {step.seconds:4.0f} s  {step.why}" for step in STEPS))
        return 0
    if not options.offline and not torch.cuda.is_available():
        print("bench.gpu_first: no GPU here; --offline rehearses", file=sys.stderr)
        return 2
    if options.source != options.out and options.source.exists() and not options.out.exists():
        options.out.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in whole_lines(options.source) if "failed" not in r or "interrupted" in r]  # others may go now
        options.out.write_text("".join(json.dumps(record) + "\n" for record in kept))
    code = take_steps(options)
    print(summary(Records(options.out, measured=not options.offline).all))
    return code


def take_steps(options: argparse.Namespace) -> int:
    """Every step until the time is over; the worst of their exit codes."""
    stop = time.monotonic() + options.seconds
    worst = 0
    for step in STEPS:
        left = stop - time.monotonic()
        if left < (0 if options.offline else step.least):
            print(f"bench.gpu_first: too little time is left for {step.name!r}; call it again", flush=True)
            continue
        print(f"== {step.name}: {step.why} ({time.strftime('%X')})", flush=True)
        extra = ["--offline", "--rehearse", "--limit", "1"] if options.offline else []
        times = ["--seconds", str(min(step.seconds, left)), "--within", str(left)]
        try:
            code = gpu.main([*step.arguments.split(), *times, "--out", str(options.out), *extra])
        except Exception:  # of what stands around the measurements; the other steps are worth their time
            if options.offline:
                raise
            traceback.print_exc(file=sys.stdout)
            code = 1
        worst = max(worst, code)
        if code == 3:
            print("bench.gpu_first: the GPU was lost; call it again, in a new process", flush=True)
            break
    return worst


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Ratios over torch.compile beside their targets, and what was wrong or failed."""
    lines = []
    for (model, dtype, batch, block, arm), wanted in TARGETS.items():
        cells = []
        for sparsity, target in zip((50, 70, 90), wanted, strict=True):
            key = {"model": model, "dtype": dtype, "batch": batch, "block": block, "sparsity": sparsity}
            found = [r[f"{arm} over compiled"][1] for r in records if _is(r, key) and f"{arm} over compiled" in r]
            cells.append(f"{found[-1]:.2f} (of {target})" if found else f"-    (of {target})")
        lines.append(f"{model} {dtype} b{batch} {block} {arm}: " + "  ".join(cells))
    bad = [r for r in records if "wrong" in r or "failed" in r or "interrupted" in r]
    lines += [gpu.line(r)[:300] for r in bad[-20:]]
    measured = sum(r["measured"] for r in records)
    return "\n".join([f"{measured} of {len(records)} records measured, {len(bad)} wrong or failed", *lines])


def _is(record: dict[str, Any], key: dict[str, Any]) -> bool:
    return record["key"].get("part") == "models" and all(record["key"].get(name) == key[name] for name in key)


if __name__ == "__main__":
    sys.exit(main())
