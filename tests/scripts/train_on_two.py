"""Run by torchrun in a folder that holds `cut/` of a killed run: what one after the other leaves in other folders.

Arguments: the folder, then the options of `fxdbsr train` that are common to all runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fxdbsr.training.arguments import add_options, options_of
from fxdbsr.training.command import train
from fxdbsr.training.options import Options
from fxdbsr.training.processes import processes
from fxdbsr.training.run import Run


def asked(name: str, *options: str) -> Options:
    """The common options and these."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return options_of(parser.parse_args([*sys.argv[2:], "--out", str(Path(sys.argv[1]) / name), *options]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, "")
    with processes("cpu") as team:
        train(asked("whole"), team)
        train(asked("cut" if team.is_first else "another machine's", "--resume"), team)
        shards = ("--parallel", "fsdp")
        train(asked("fsdp", *shards), team)
        (Path(sys.argv[1]) / "fsdp_cut").mkdir(exist_ok=True)
        Run(asked("fsdp_cut", *shards), team).train_epoch(lambda: None)
        team.wait()
        train(asked("fsdp_cut", *shards, "--resume"), team)
