"""The command line: `fxdbsr COMMAND ...`, and the same as `python -m fxdbsr`.

A command is a module with `add_arguments(parser)` and `run(args) -> int`, imported when it is called. What it
raises as ValueError, TypeError, OSError, ImportError or RuntimeError (a backend that cannot run here) is the
user's to mend: one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS = {
    "demo": ("fxdbsr.demo", "train, convert and report a small ResNet on bundled images"),
    "train": ("fxdbsr.training.command", "train a net to block sparsity, on one process or under torchrun"),
    "report": ("fxdbsr.commands.report", "the table of MACs, parameters and blocks of a model, and its page"),
    "convert": ("fxdbsr.commands.convert", "a prepared model's checkpoint to a file with block-sparse kernels"),
    "bench": ("fxdbsr.commands.bench", "the converted model's time beside the dense one's, on this machine"),
}
EXAMPLES = """\
examples:
  fxdbsr demo
  fxdbsr train --data digits --model resnet20 --block 8x8 --target 0.5
  fxdbsr report resnet50 --block 32x32 --sparsity 0.5 --html resnet50.html
  fxdbsr convert resnet50 --checkpoint best.pt --block 32x32 -o resnet50.pt2
  fxdbsr bench resnet50 --sparsity 0.5,0.7,0.9 --batch 1,8
  fxdbsr COMMAND --help

--json gives JSON in place of words. Commands print plain text, and exit with 0, or with 2 and one line on stderr where
something is wrong with what they were given. sparsity is the fraction that is zero; 1 MAC is 2 FLOPs.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, command = _parser(arguments)
        args = parser.parse_args(arguments)
        if command is None:
            parser.print_help()
            return 2
        code: int = command.run(args)
        sys.stdout.flush()
    except SystemExit as leave:
        return int(leave.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"fxdbsr {arguments[0]}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"fxdbsr {arguments[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code


def _parser(arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, Any]:
    """The parser with the arguments of the command that is called, and that command's module or None."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fxdbsr", description=_version(), epilog=EXAMPLES, formatter_class=kind)
    parser.add_argument("--version", action="version", version=_version().rpartition(" ")[2])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = None
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary, formatter_class=kind)
        if arguments and arguments[0] == name:
            command = import_module(module)
            command.add_arguments(sub)
    return parser, command


def _version() -> str:
    from fxdbsr import __version__

    return f"Block-sparse convolutional networks, version {__version__}"
