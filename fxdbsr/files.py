"""Writing the files that a user asked for: refused before the work where it cannot be done, never left half written."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from os import PathLike
from pathlib import Path

STALE = 3600.0  # seconds after which what a process that died left beside a file goes


def check_writable(path: str | PathLike[str]) -> None:
    """Refuse a `path` that `write` could not write, without touching it.

    Raises:
        OSError: its folder is missing or closed to us, or it is a folder itself. TypeError: it is no path.
    """
    path = as_path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: No such file or directory: {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: Permission denied")


def as_path(path: object) -> Path:
    """`path`, a string or a path.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path: expected a string or a path, got {path!r}")
    return Path(path)


def unfinished(path: Path) -> Path:
    """A new name beside `path` to write to first; what processes that died left under such names goes."""
    stem, suffix = path.stem[:100], path.suffix or ".part"  # torch.save takes no name that is all suffix
    for left in path.parent.glob(f".{escape(stem)}-{'[0-9a-f]' * 8}{escape(suffix)}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()
    return path.with_name(f".{stem}-{secrets.token_hex(4)}{suffix}")


@contextmanager
def writing(path: str | PathLike[str]) -> Iterator[Path]:
    """A new file beside `path` to write to, which takes its place in one step if nothing raises.

    Devices and pipes (/dev/stdout) are written directly.
    """
    path = Path(path)
    check_writable(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666
    part = unfinished(path)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write(path: str | PathLike[str], content: str | bytes) -> None:
    """`content` to `path`, text as UTF-8, in one step.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path) as part:
        part.write_bytes(data)
