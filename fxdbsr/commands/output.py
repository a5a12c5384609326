"""What commands print and write: words for people on stdout, or JSON in their place, never both."""

from __future__ import annotations

import argparse
import sys

from fxdbsr.files import check_writable, write


def add_json(parser: argparse.ArgumentParser, what: str = "the figures") -> None:
    """Declare `--json [PATH]`."""
    words = f"{what} as JSON on stdout, in place of the words; or into the file PATH, beside them"
    parser.add_argument("--json", nargs="?", const="-", metavar="PATH", help=words)


def check_outputs(*paths: str | None) -> None:
    """Refuse paths that cannot be written, before any work is done; "-" and None pass.

    Raises:
        OSError: one cannot be written.
        ValueError: two want stdout.
    """
    if sum(path == "-" for path in paths) > 1:
        raise ValueError("only one output can go to stdout ('-'), got several")
    for path in paths:
        if path not in (None, "-"):
            check_writable(str(path))


def put(path: str, text: str) -> None:
    """`text` and one line end to the file `path`, or to stdout where that is "-"."""
    text = text.rstrip("\n") + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        write(path, text)
